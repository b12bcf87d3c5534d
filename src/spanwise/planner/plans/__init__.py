"""From an outline to a Plan that holds: rows, memory, halves, and the trial by the simulator."""
