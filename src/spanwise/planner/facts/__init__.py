"""What every planner looks up: layer times, links, kinds of devices, rows inside a stage."""
