"""FedAvg on digits as a Flower app."""
