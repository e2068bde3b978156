"""The model as one of several equal copies, whose gradients are summed over the processes once a step."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microlm.models.student import StudentLM
from microlm.runtime import distributed

# the rotary tables are equal everywhere and never change; before PyTorch 2.13 the argument had another name
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
WITHOUT_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False}


class Replica:
    """`model` itself where there is one process.

    The head's weight is used outside the wrapped forward pass too, by the loss. Its gradient arrives whole all the
    same: DistributedDataParallel hooks the parameter's one accumulator, which runs when autograd has summed all uses.
    """

    def __init__(self, model: StudentLM) -> None:
        self.model = model
        self._shared: DistributedDataParallel | None = None
        if distributed.size() > 1:
            # blocks are compiled one by one, so that gradients leave between them: none has to be split for that
            torch._dynamo.config.optimize_ddp = False
            self._shared = DistributedDataParallel(model, gradient_as_bucket_view=True, **WITHOUT_BUFFERS)
            self._shared.register_comm_hook(None, _sum_gradients)

    def hidden(self, tokens: Tensor) -> Tensor:
        """As `StudentLM.hidden` of tokens [B, T]."""
        return self.model.hidden(tokens) if self._shared is None else self._shared(tokens)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass: gradients stay here until the step's `last` one has added its own."""
        return nullcontext() if last or self._shared is None else self._shared.no_sync()


def _sum_gradients(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The sum, not DistributedDataParallel's mean: every part of the loss is divided by the whole step's tokens."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
