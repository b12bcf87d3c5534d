"""How a run under way notices that devices or links changed, and what plan it takes then."""
