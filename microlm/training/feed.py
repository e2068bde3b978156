"""The micro-batches of this process on the training's device; on CUDA they are read and pinned a step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, Batches
from microlm.runtime import distributed

Reader = Callable[[np.ndarray, int], Tensor | None]
"""(windows [B], step) -> records of the teacher's cache, uint8 [B * T, bytes of a record], or None."""


class Feed:
    """`batches`, of which this process takes its share of every step.

    Args:
        read: what else the loss wants of each batch.
        ahead: read the next step in a thread during this one; None does so on CUDA.
    """

    def __init__(
        self, batches: Batches, device: torch.device, read: Reader | None = None, ahead: bool | None = None
    ) -> None:
        self.config = batches.config
        self._batches, self._device, self._more = batches, device, read
        ahead = device.type == "cuda" if ahead is None else ahead
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's forward passes of the step, in order."""
        if self._reader is None:
            return [self._moved(batch) for batch in self._read(step)]
        if self._next is None or self._next[0] != step:
            self._next = (step, self._reader.submit(self._read, step))
        found = self._next[1].result()
        self._next = (step + 1, self._reader.submit(self._read, step + 1))
        return [self._moved(batch) for batch in found]

    def of_step(self, step: int) -> np.ndarray:
        """The windows of the step, those of all processes."""
        return self._batches.of_step(step)

    def _read(self, step: int) -> list[Batch]:
        found = self._batches.micro_batches(step, distributed.rank(), distributed.size())
        if self._more is not None:
            found = [replace(batch, records=self._more(batch.windows, step)) for batch in found]
        if self._device.type != "cuda":
            return found
        return [_each(batch, Tensor.pin_memory) for batch in found]

    def _moved(self, batch: Batch) -> Batch:
        return _each(batch, lambda tensor: tensor.to(self._device, non_blocking=True))


def _each(batch: Batch, moved: Callable[[Tensor], Tensor]) -> Batch:
    return replace(batch, rows=moved(batch.rows), records=None if batch.records is None else moved(batch.records))
