"""The processes that share one stage: who this one is, what they agree on, how work is dealt to them.

One process is the usual case, and there nothing here does anything. Several are started by torchrun, the user's own or
launcher.py's: each reads its place from the environment (RANK, WORLD_SIZE), as PyTorch has it. The number of processes
is no parameter of a result.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# the first process may hash or publish for hours while the others wait; a lost one is noticed at once all
# the same, its connections close
PATIENCE = timedelta(days=2)

_control: dist.ProcessGroup | None = None  # over gloo: what is agreed on the CPU waits for no GPU


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """Place among the processes of this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if started_by_torchrun() else 0


def local_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started_by_torchrun() else 1


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun started, for the body; gradients go over nccl on CUDA, gloo on the CPU."""
    global _control
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        # nccl's own 10 minutes would end a training in which one process compiles or reads a cache as much longer; one
        # that is gone is no reason either, torchrun ends the others
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
        _control = dist.group.WORLD
    yield
    # only where all ends well: after an error the others may be gone, and leaving together would wait for them
    _control = None
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def dealt(items: Sequence[T]) -> Sequence[T]:
    """Those of `items` that are this process's: every `size()`-th."""
    return items[rank() :: size()]


def wait_for_all() -> None:
    """Return once every process is here."""
    if size() > 1:
        dist.barrier(_control)


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process; all get the same answer at the same point."""
    return bool(largest(int(flag)))


def largest(value: int) -> int:
    """The largest that any process says; all get the same answer at the same point."""
    if size() == 1:
        return value
    said = torch.tensor([value])
    dist.all_reduce(said, dist.ReduceOp.MAX, _control)
    return int(said.item())


def sum_over_ranks(values: Tensor) -> Tensor:
    """`values`, on the CPU, summed over the processes."""
    if size() > 1:
        dist.all_reduce(values, group=_control)
    return values


def lost_another(error: BaseException) -> bool:
    """Whether `error` only says that another process is gone, or that the network between them is."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
