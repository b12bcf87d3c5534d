"""A lower bound on the step time of any plan, by compute and by links."""
