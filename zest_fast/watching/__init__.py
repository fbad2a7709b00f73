"""The profile while it trains: what a step of training yields, where it is logged, and how a log is looked at."""
