"""Sub-models of a classifier: built from it, trained apart, merged exactly. Submodules need torch."""
