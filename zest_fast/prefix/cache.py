"""What users say of a prefix cache, and what it says of itself."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zest_fast.foundation.byte_counts import memory_bytes
from zest_fast.foundation.nearest import some

if TYPE_CHECKING:
    from zest_fast.prefix.cached_passes import CachedPasses


class PrefixCache:
    """Keep what frozen layers below the cut compute, on disk: from the second epoch on they do not run.

    Give it to `SelectiveBackward(..., cache=PrefixCache(folder))` and train as before. The first time that a sample
    comes, the layers below the cut compute its activations, which are written to the folder; every further time they
    are read, and the forward pass starts at the cut. Several tensors across the cut (residuals, masks, rotary tables,
    the output of an encoder) are found by following the values of the first batch. What is read is what the same layers
    would compute, but for the rounding of other batch sizes.

    A sample is known by the bytes of its inputs, so loaders may shuffle; a sample that is padded to another length, in
    another memory format, or augmented at random, is another sample. The folder may hold caches of many models: what
    was written for other weights, another cut, dtype, mode, or torch is never read. Files of a process that was killed
    are read up to their last whole record, damaged ones are named and computed again, and several processes may share a
    folder. Nothing is deleted by itself: remove the folder when you are done.

    The outputs of the first two batches of each shape, of the first that is read and of one in 64 are compared with
    those of the full pass; of the 2nd, 4th, 8th ... that is read, two samples with what the layers below the cut give.

    Passes without gradients (validation), in compiled code and of several threads at once run as they would without it.

    Args:
        folder: made where it does not exist.
        limit: bytes of the whole folder, "50GB" (10^9) or "50GiB" (2^30); samples beyond are computed in every epoch.
        samples: in an epoch, if you know. As soon as there are more than that without one being read again, the loader
            changes its samples: a warning says so, and nothing more is kept.
        eval_prefix: run the layers below the cut in eval mode. Dropout in train mode gives other activations each time
            and is refused otherwise.

    Raises:
        ValueError: a limit that is no size, or `samples` below 1. Of the first forward pass: nothing can be kept, with
            what prevents it.
        NotADirectoryError: the folder is a file.

    Examples:
        >>> import tempfile, torch, zest_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = torch.randn(12, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = zest_fast.PrefixCache(folder, limit="1GB", samples=12)
        ...     with zest_fast.SelectiveBackward(model, ["2"], cache=cache):
        ...         for rows in [*data.split(6), *data.split(6)]:
        ...             model(rows).sum().backward()
        ...         print(cache.kept, cache.read, cache.computed)
        12 12 12
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        limit: str | int = "50GB",
        samples: int | None = None,
        eval_prefix: bool = False,
    ) -> None:
        if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
            raise ValueError(f"samples={samples!r}: how many there are in an epoch, at least 1, or None")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{os.fspath(folder)!r} is a file; name a folder for the activations")
        self.limit = memory_bytes(limit, "limit")
        self.samples, self.eval_prefix = samples, eval_prefix
        self.read = 0
        """Samples whose activations were read."""
        self.computed = 0
        """Samples for which the layers below the cut ran."""
        self.plain: Counter[str] = Counter()
        """Why passes ran without the cache, and how many."""
        self.stopped = ""
        """Why nothing more is kept; "" while it is."""
        self.seconds_reading = self.seconds_computing = 0.0
        self.passes: CachedPasses | None = None
        """Those of the latest model that it was given to."""

    @property
    def forecast(self) -> str:
        """What it takes and saves, once the first batch is through; "" before."""
        each = 0 if self.passes is None else self.passes.bytes_per_sample
        if not each:
            return ""
        text = f"{each:,} bytes a sample"
        if self.samples is not None:
            text += f", {each * self.samples / 1e9:.3g} GB for {self.samples:,} samples"
        text += f" in {os.fspath(self.folder)!r}"
        if self.kept > self.computed:
            text += f", where {self.kept - self.computed:,} are already"
        if self.computed:
            takes = self.seconds_computing / self.computed
            whole = f", {takes * self.samples:.3g} s an epoch" if self.samples is not None else ""
            text += f"; computing one takes {1e3 * takes:.3g} ms{whole}, which further epochs save"
        return text

    @property
    def kept(self) -> int:
        """Samples whose activations are on disk, of this model."""
        return 0 if self.passes is None else self.passes.kept

    @property
    def bytes_kept(self) -> int:
        """On disk, of these."""
        return 0 if self.passes is None else self.passes.bytes_kept

    def __str__(self) -> str:
        if not self.forecast and not self.plain:
            return f"nothing yet, in {os.fspath(self.folder)!r}"
        text = f"{self.kept:,} samples in {self.bytes_kept / 1e9:.3g} GB"
        text += f"; {self.computed:,} computed, {self.read:,} read"
        if self.computed and self.read:
            reading = self.seconds_reading / (self.read + self.computed)
            text += (
                f" (in {1e3 * reading:.2g} ms each in place of {1e3 * self.seconds_computing / self.computed:.2g} ms)"
            )
        if self.stopped:
            text += f"; nothing more is kept: {self.stopped}"
        if self.plain:
            text += f"; {sum(self.plain.values()):,} passes without it: {some(self.plain)}"
        return text

    def __repr__(self) -> str:
        return f"PrefixCache({os.fspath(self.folder)!r}): {self}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy, as of a model with its wrapper, serves nothing yet."""
        return vars(PrefixCache(self.folder, limit=self.limit, samples=self.samples, eval_prefix=self.eval_prefix))
