"""What is remembered of one position: columns of tensors on any device, and the bytes that they are on the disk.

A record says of the token after a position, column after column without padding:

    ids       k of the k most likely tokens, the likeliest first, uint16 where the vocabulary allows
    log_p     k log-probabilities at temperature 1, float16: a `full` record
    code      k bytes for the same, see `encode`: a `compact` record
    log_tail  for each captured temperature T, log of the sum of p^(1/T) over all other tokens, float32

That of a teacher with another tokenizer (see projection.py) holds ids and log_p or code for each captured temperature,
[T, k], since the projected distribution at a temperature does not follow from that at another, log_tail of the
probabilities themselves, and

    covered   whether the teacher speaks of this position at all

The code of a compact record is the drop from the log-probability before it as decoded, so that errors do not add up, on
a quadratic scale of 255 steps to LARGEST_DROP nats. It is made and read in whole units of the scale, which are the same
on every device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_DROP = 16.0  # nats from one entry to the next that a byte can say; what is left over, the next byte says
UNIT = LARGEST_DROP / 255**2  # nats
FLOAT16_ROUNDING = 2.0**-11  # of a log-probability in a full record, relative


class Labels(NamedTuple):
    """Records of N positions."""

    rows: Tensor  # uint8 [N, bytes of a record]
    gold: Tensor  # float32 [N], log-probability of the token that follows in the text; kept apart: no training reads it


@dataclass(frozen=True)
class Columns:
    """Records read. N positions, k entries, T captured temperatures; [T, k] in place of [k] where projected."""

    ids: Tensor  # int64 [N, k]
    log_p: Tensor  # float32 [N, k]
    log_tail: Tensor  # float32 [N, T]
    covered: Tensor | None  # bool [N]; None: everywhere
    rounding: Tensor  # float32 [N, k], nats: how far a log-probability may be from what the teacher said


@dataclass(frozen=True)
class RecordLayout:
    """Where each column lies in a record's bytes."""

    kind: str  # full | compact
    n_vocab: int
    top_k: int
    temperatures: int
    projected: bool

    @property
    def columns(self) -> dict[str, tuple[torch.dtype, int]]:
        """dtype and number of values of each; unsigned integers by the signed ones of their size."""
        heads = self.top_k * (self.temperatures if self.projected else 1)
        ids = torch.int16 if self.n_vocab <= 2**16 else torch.int32
        said = {"code": (torch.uint8, heads)} if self.kind == "compact" else {"log_p": (torch.float16, heads)}
        marks = {"covered": (torch.uint8, 1)} if self.projected else {}
        return {"ids": (ids, heads), **said, "log_tail": (torch.float32, self.temperatures), **marks}

    @property
    def itemsize(self) -> int:
        """Bytes of a record."""
        return sum(dtype.itemsize * count for dtype, count in self.columns.values())

    def pack(self, ids: Tensor, log_p: Tensor, log_tail: Tensor, covered: Tensor | None = None) -> Tensor:
        """Columns as `Columns` has them -> uint8 [N, itemsize], on their device. log_p falls along its last dimension;
        where it is NaN, log_tail has to be NaN too.
        """
        said = encode(log_p) if self.kind == "compact" else log_p.half()
        given = {"ids": ids, "code": said, "log_p": said, "log_tail": log_tail, "covered": covered}
        parts = [
            given[name].flatten(1 if given[name].ndim > 1 else 0).view(len(ids), count).to(dtype).view(torch.uint8)
            for name, (dtype, count) in self.columns.items()
        ]
        return torch.cat(parts, dim=1)

    def unpack(self, rows: Tensor) -> Columns:
        """`pack` read back, on the device of `rows`, uint8 [N, itemsize]."""
        found, at = {}, 0
        for name, (dtype, count) in self.columns.items():
            size = dtype.itemsize * count
            # a copy always: of a single row `contiguous` gives the row itself, at whatever byte it starts
            found[name] = rows[:, at : at + size].clone(memory_format=torch.contiguous_format).view(dtype)
            at += size
        head = (len(rows), self.temperatures, self.top_k) if self.projected else (len(rows), self.top_k)
        ids = (found["ids"].long() & (2 ** (8 * found["ids"].itemsize) - 1)).view(head)
        if self.kind == "compact":
            code = found["code"].view(head)
            log_p, rounding = decode(code), code_rounding(code)
        else:
            log_p = found["log_p"].float().view(head)
            rounding = FLOAT16_ROUNDING * log_p.abs()
        marks = found["covered"][:, 0].bool() if self.projected else None
        return Columns(ids, log_p, found["log_tail"], marks, rounding)


def encode(log_p: Tensor) -> Tensor:
    """Log-probabilities [..., k] that do not rise -> uint8 [..., k].

    The last one is rounded up, since no token outside may be likelier than it (see objective/capped_tail.py); the
    others to the nearest.
    """
    depth = -log_p / UNIT  # from certainty, in units
    total = torch.zeros_like(depth[..., 0])
    code = torch.empty(log_p.shape, dtype=torch.uint8, device=log_p.device)
    for i in range(log_p.shape[-1]):
        steps = (depth[..., i] - total).clamp(0, 255**2).nan_to_num(0).sqrt()
        steps = steps.floor() if i == log_p.shape[-1] - 1 else steps.round()
        code[..., i] = steps.to(torch.uint8)
        total += steps.square()  # whole numbers below 2^24: exact
    return code


def decode(code: Tensor) -> Tensor:
    """uint8 [..., k] -> float32 log-probabilities [..., k]."""
    return code.int().square().cumsum(-1).float() * -UNIT


def code_rounding(code: Tensor) -> Tensor:
    """How far from what was encoded each decoded value may be, nats, [..., k]: the step to the next code, of the last
    byte that was not 0 (one that fell short of its byte's next value is 0), and anything where it was the largest.
    """
    step = torch.where(code == 255, torch.inf, (2 * code.float() + 1) * UNIT)
    place = torch.arange(code.shape[-1], device=code.device).expand(code.shape)
    return step.gather(-1, torch.where(code > 0, place, 0).cummax(-1).values)
