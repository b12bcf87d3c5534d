"""From a module to a ModelGraph, from a device to its layer times. Import the submodules: some need torch."""
