"""One file per family of models; import the factories from ``spanwise.zoo``."""
