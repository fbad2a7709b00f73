"""Which layers of this model should I fine-tune, and how do I do that on the card I have?"""

import torch  # noqa: F401  before the extension: whichever comes first decides which OpenMP runtime both use

from zest_fast import kernels

__all__ = ["kernels"]
