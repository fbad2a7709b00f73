"""Where the steps of a watched run are logged, and how a log is looked at."""
