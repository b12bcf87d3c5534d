"""Which devices hold which layers: searches over stages, groups and cuts."""
