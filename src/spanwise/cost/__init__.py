"""The only formulas: transfer, collective, memory, sub-models. Simulator and planners share them."""
