"""A sweep in a quadratic model of the loss, for all layers at once."""
