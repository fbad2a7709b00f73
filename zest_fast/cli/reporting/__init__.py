"""One page of what a run has left: the files of it that are read, the figures, the page."""
