"""Which layers of this model should I fine-tune, and how do I do that on the card I have?"""

import torch  # noqa: F401  before the extension: whichever comes first decides which OpenMP runtime both use

from zest_fast import kernels
from zest_fast.finetuning.selective_backward import SelectiveBackward
from zest_fast.profiling.layer_profile import LayerProfile
from zest_fast.profiling.profile import profile
from zest_fast.ranking.ranking import Ranking, rank

__all__ = ["LayerProfile", "Ranking", "SelectiveBackward", "kernels", "profile", "rank"]
