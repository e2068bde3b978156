"""Which windows make up a step: a pure function of the step, so that nothing of a loader has to be saved to resume.

Window w of a split reads tokens [w L, w L + L) and predicts tokens [w L + 1, w L + L + 1).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.parameters import BatchConfig
from microlm.runtime.paths import OUTSIDE, SHARDS


@dataclass(frozen=True)
class Batch:
    """Windows of one forward pass, by their names in the teacher's cache."""

    windows: np.ndarray  # int64 [B]
    rows: Tensor  # int64 [B, T + 1], contiguous: a copy from pinned memory waits for nobody
    records: Tensor | None = None  # uint8 [B * T, bytes of a record] of the teacher's cache, where they were read ahead

    @property
    def tokens(self) -> Tensor:
        """int64 [B, T]."""
        return self.rows[:, :-1]

    @property
    def targets(self) -> Tensor:
        """int64 [B, T], the token after each."""
        return self.rows[:, 1:]


def window_count(shards: TokenShards, seq_len: int) -> int:
    """Whole windows in the split, each with the token that follows it."""
    count = (shards.n_tokens - 1) // seq_len
    if count < 1:
        folder = OUTSIDE if shards.split == "outside" else SHARDS
        raise UserError(
            f"{folder}: the {shards.split} split has {shards.n_tokens} tokens, fewer than one window of "
            f"batch.seq_len={seq_len}; give more text or a shorter seq_len"
        )
    return count


def evenly_spaced(available: int, wanted: int) -> np.ndarray:
    """`wanted` of `available` windows (all, where there are no more), the same whatever the seed."""
    wanted = min(wanted, available)
    return np.arange(wanted, dtype=np.int64) * available // wanted


def read_batch(shards: TokenShards, windows: np.ndarray, seq_len: int) -> Batch:
    return Batch(windows, torch.from_numpy(shards.windows(windows * seq_len, seq_len + 1)))


def cached_windows(shards: TokenShards, seq_len: int, wanted: int) -> np.ndarray:
    """The windows that the teacher labels and that `continue` and `distill` train on."""
    return evenly_spaced(window_count(shards, seq_len), wanted)


def uncached_windows(shards: TokenShards, seq_len: int, wanted: int) -> np.ndarray:
    """The rest: text that the control may read and that leaves `cached_windows` new to its continuations."""
    rest = np.setdiff1d(np.arange(window_count(shards, seq_len)), cached_windows(shards, seq_len, wanted))
    if not len(rest):
        raise UserError(
            "params.yaml: pretrain.windows: uncached leaves no window, teacher.windows takes all of them; lower "
            "teacher.windows or set pretrain.windows: all"
        )
    return rest


class Batches:
    """The windows of every step: each once an epoch, shuffled anew each epoch, the same in every training.

    Args:
        windows: the windows to train on; None takes the whole split.
        seed: of the order alone.
    """

    def __init__(self, shards: TokenShards, config: BatchConfig, seed: int, windows: np.ndarray | None = None) -> None:
        self.shards, self.config, self.seed = shards, config, seed
        self.windows = np.arange(window_count(shards, config.seq_len)) if windows is None else windows
        self._order: tuple[int, np.ndarray] = (-1, self.windows)

    def of_step(self, step: int) -> np.ndarray:
        """The windows of a step, int64 [rows of the step]."""
        places = np.arange(step * self.config.rows, (step + 1) * self.config.rows)
        epochs, offsets = np.divmod(places, len(self.windows))
        return np.concatenate([self._permuted(epoch)[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def micro_batches(self, step: int, first: int = 0, every: int = 1) -> list[Batch]:
        """The step's forward passes, in order; of several processes each takes `every`-th ones from its `first` on."""
        windows, rows = self.of_step(step), self.config.micro_batch_rows
        starts = range(0, len(windows), rows)[first::every]
        return [read_batch(self.shards, windows[i : i + rows], self.config.seq_len) for i in starts]

    def _permuted(self, epoch: int) -> np.ndarray:
        found, windows = self._order  # read at once: another thread may ask for another epoch
        if found != epoch:
            order = np.random.Generator(np.random.PCG64([self.seed, int(epoch)])).permutation(len(self.windows))
            windows = self.windows[order]
            self._order = (epoch, windows)
        return windows
