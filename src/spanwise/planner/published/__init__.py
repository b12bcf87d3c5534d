"""Planners of others by their published rules, on the same runtime and simulator."""
