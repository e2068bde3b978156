"""The micro-batches of this process on the training's device; on CUDA they are read and pinned a step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from microlm import distributed
from microlm.corpus.batches import Batch, Batches


class Feed:
    """`batches`, of which this process takes its share of every step.

    Args:
        ahead: read the next step in a thread during this one; None does so on CUDA.
    """

    def __init__(self, batches: Batches, device: torch.device, ahead: bool | None = None) -> None:
        self.config = batches.config
        self._batches, self._device = batches, device
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
        if self._device.type != "cuda":
            return found
        return [Batch(batch.windows, batch.tokens.pin_memory(), batch.targets.pin_memory()) for batch in found]

    def _moved(self, batch: Batch) -> Batch:
        moved = (tensor.to(self._device, non_blocking=True) for tensor in (batch.tokens, batch.targets))
        return Batch(batch.windows, *moved)
