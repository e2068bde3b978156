"""The micro-batches of this process on the training's device; on CUDA they are read and pinned a step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from microlm.corpus.batches import Batch, Batches
from microlm.objective.fused_head import HeadLoss
from microlm.runtime import distributed

Loss = Callable[[Tensor, Tensor, Batch, int, float], HeadLoss]
"""(hidden [N, D], head weight [V, D], batch, tokens of the whole step, share of the training done) -> loss of this
part of the step."""


class Feed:
    """`batches`, of which this process takes its share of every step, and the loss that is made of them.

    Args:
        loss: what it reads of a batch (`Distillation.read`), where it reads anything, comes with the batch.
        progress: the share of the training that is done at a step.
        ahead: read the next step in a thread during this one; None does so on CUDA.
    """

    def __init__(
        self,
        batches: Batches,
        loss: Loss,
        progress: Callable[[int], float],
        device: torch.device,
        ahead: bool | None = None,
    ) -> None:
        self.batches, self.loss, self.progress = batches, loss, progress
        self._device = device
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

    def _read(self, step: int) -> list[Batch]:
        found = self.batches.micro_batches(step, distributed.rank(), distributed.size())
        if read := getattr(self.loss, "read", None):
            found = [replace(batch, records=read(batch.windows, self.progress(step))) for batch in found]
        if self._device.type != "cuda":
            return found
        return [_each(batch, Tensor.pin_memory) for batch in found]

    def _moved(self, batch: Batch) -> Batch:
        return _each(batch, lambda tensor: tensor.to(self._device, non_blocking=True))


def _each(batch: Batch, moved: Callable[[Tensor], Tensor]) -> Batch:
    return replace(batch, rows=moved(batch.rows), records=None if batch.records is None else moved(batch.records))
