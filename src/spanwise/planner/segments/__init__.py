"""Where messages are cut, so that they hide behind compute: optimum, published rules, both directions."""
