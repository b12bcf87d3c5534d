"""HierTrain: machines start rows of their own, and one of them finishes all."""
