"""The card: what it is, how long something takes on it, how much memory it held."""

import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from microlm.errors import UserError
from microlm.runtime.device import peak_memory_bytes

REHEARSE = "python -m bench.gpu --rehearse"


@dataclass(frozen=True)
class Card:
    """A device as far as its figures have to name it."""

    card: str
    capability: str  # compute capability; empty for a CPU
    memory_bytes: int
    bfloat16: bool
    torch: str
    cuda: str | None

    @property
    def file_name(self) -> str:
        """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3.json."""
        return re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-") + ".json"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def card_here() -> Card | None:
    """The first CUDA device, None where PyTorch sees none."""
    if not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    good = torch.cuda.is_bf16_supported(including_emulation=False)
    capability = f"{seen.major}.{seen.minor}"
    return Card(seen.name, capability, seen.total_memory, good, torch.__version__, torch.version.cuda)


def refuse_unfit(card: Card | None) -> Card:
    """UserError, one line, where there is no card or one on which the figures would be of something else."""
    if card is None:
        raise UserError(
            f"no CUDA device is here (PyTorch {torch.__version__} sees none); on a machine without one, run every part "
            f"at a tiny shape with: {REHEARSE}"
        )
    if not card.bfloat16:
        raise UserError(
            f"{card.card} (compute capability {card.capability}) computes no bfloat16, in which every figure is taken; "
            f"use a card of capability 8.0 or higher, or rehearse with: {REHEARSE}"
        )
    return card


def cpu() -> Card:
    """For the rehearsal."""
    return Card("CPU", "", 0, True, torch.__version__, None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 1) -> float:
    """Median wall-clock of `run`, all that it launched included."""
    for _ in range(warm_up):
        run()
    found = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def forget_peak(device: torch.device) -> int:
    """Begin to watch the memory anew; returns the bytes that are held now."""
    if device.type != "cuda":
        return 0  # `peak_bytes` is then of the whole process, which no clearing away can lower
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes() -> int:
    """Most since `forget_peak` on CUDA; on the CPU the process's most ever."""
    return peak_memory_bytes()


def compilations() -> int:
    """Graphs that torch.compile has made in this process so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
