"""The traced operations as data, and stages built from them. Submodules need torch."""
