"""Is this cache that teacher's? Replay windows through the live teacher and hold the records against it.

The replay does not use the capture's code: it takes the whole vocabulary's log-probabilities and reads from them what a
record claims. Ids are compared through their log-probabilities alone, for tokens of equal logits may swap places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.models.interface import LanguageModel
from microlm.teacher.cache import MANIFEST, REMAKE, TeacherCache
from microlm.teacher.projection import Projection
from microlm.teacher.records import Columns

ROWS = 256  # positions whose logits exist at once
FIELDS = ("log_p", "log_tail", "gold")
# in units of a dtype's rounding (see `allowed_nats`)
LARGEST, MEAN = 8.0, 0.35
SMALLEST = float(np.log(np.finfo(np.float32).tiny))  # of a logarithm that the capture's float32 sums can hold
LEAST_ALLOWED_NATS = 1e-3  # what the order of a float32 sum may leave, on any machine


def allowed_nats(dtype: torch.dtype, logit_scale: float) -> tuple[float, float]:
    """The largest and the mean difference, nats, that the rounding of activations explains.

    The unit is `eps * logit_scale`: the dtype's machine epsilon times the largest logit, 0.31 nats for the packaged
    SmolLM2-135M in bfloat16. A bfloat16 cache of that teacher (24 windows of 256 tokens, top 64), replayed in other
    batch compositions and with fewer threads, is off by 0. With kernels that sum in another order (attention, AVX-512
    or AVX2 products, float32 throughout) it is off by at most 0.96 nats and 0.066 on average: 3.1 and 0.21 units. With
    one matrix of one layer scaled by 1.5 it is off by 7.5 and 0.29 nats. In float32 other kernels leave 3e-5 nats. A
    change that moves the predictions less than rounding does is seen by the fingerprint of the weights alone.
    """
    unit = torch.finfo(dtype).eps * logit_scale
    return max(LARGEST * unit, LEAST_ALLOWED_NATS), max(MEAN * unit, LEAST_ALLOWED_NATS)


@dataclass
class Spread:
    """Absolute differences in nats."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, difference: Tensor) -> None:
        self.largest = float(np.maximum(self.largest, difference.max().item()))  # keeps a NaN, as max() would not
        self.total += float(difference.double().sum())
        self.count += difference.numel()

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


@dataclass
class Replay:
    """Live against cached, at these temperatures; `projection`: of a teacher with another tokenizer than the shards'.

    `outranked`: how far the likeliest token outside the cached ids stands above the least likely one inside.
    `changed_marks`: positions that are covered in one and not in the other.
    """

    temperatures: Sequence[float]
    projection: Projection | None = None
    spreads: dict[str, Spread] = field(default_factory=lambda: {name: Spread() for name in FIELDS})
    outranked: Spread = field(default_factory=Spread)
    changed_sets: int = 0
    changed_marks: int = 0
    positions: int = 0
    logit_scale: float = 0.0

    def add(self, logits: Tensor, targets: Tensor, cached: Columns, gold: Tensor) -> None:
        """logits [n, V], or [n, U] of a teacher with another tokenizer; targets int64 [n]; what the cache says of these
        positions, which it covers, and of their targets [n]."""
        projection = self.projection
        z = logits.float() if projection is None else logits[:, : len(projection.first)].float()
        self.logit_scale = max(self.logit_scale, float(z.abs().max()))
        self.positions += len(z)
        for column, temperature in enumerate(self.temperatures):
            stretch = min(1.0, temperature)  # below 1 logits are stretched, and their rounding with them
            heads = cached.ids, cached.log_p, cached.rounding
            if projection:
                heads = (values[:, column] for values in heads)
                live, least = _projected(z / temperature, projection), SMALLEST
            else:  # the tail is of p^(1/T), and summed from the likeliest token on; ids and log_p are of p
                live = (z - z.logsumexp(-1, keepdim=True)) / temperature
                least = SMALLEST + live.amax(-1)
            ids, said, rounding = heads
            head, rest = live.gather(1, ids), live.scatter(1, ids, -torch.inf)
            if projection or temperature == 1:
                self.spreads["log_p"].add(((head - said).abs() - rounding).clamp_min(0) * stretch)
                self.outranked.add((rest.amax(-1) - head.amin(-1)).clamp_min(0) * stretch)
            if temperature == 1:
                self.spreads["gold"].add((live.gather(1, targets[:, None])[:, 0] - gold).abs())
                self.changed_sets += int((rest.amax(-1) > head.amin(-1)).sum())
            if ids.shape[1] < live.shape[1]:  # else there is no tail
                tail = rest.logsumexp(-1).clamp_min(least)
                self.spreads["log_tail"].add((tail - cached.log_tail[:, column]).abs() * stretch)

    def refuse_excess(self, dtype: torch.dtype, where: Path, teacher: str) -> None:
        """UserError, one line, where the cache `where` differs from what `teacher` says now by more than rounding in
        `dtype` explains."""
        largest, mean = allowed_nats(dtype, self.logit_scale)
        excess = [f"which positions it covers, {self.changed_marks:,} of them"] * bool(self.changed_marks)
        excess += [
            f"{name} by up to {spread.largest:.3g} nats, {spread.mean:.3g} on average"
            for name, spread in self.spreads.items()
            if not (spread.largest <= largest and spread.mean <= mean)  # a NaN is an excess too
        ]
        if not self.outranked.largest <= largest:
            excess.append(f"which ids are the likeliest, by up to {self.outranked.largest:.3g} nats")
        if excess:
            raise UserError(
                f"{where}: {teacher} differs in {excess[0]}, where rounding explains {largest:.3g} and {mean:.3g}: it "
                f"is another teacher's cache or one made wrong; {REMAKE}"
            )

    def lines(self, dtype: torch.dtype) -> list[str]:
        """What was found, for a person."""
        largest, mean = allowed_nats(dtype, self.logit_scale)
        spreads = self.spreads.items()
        return [
            *(f"{name:<9} largest {s.largest:.5f}, mean {s.mean:.6f} nats, live against cached" for name, s in spreads),
            f"ids       {self.changed_sets:,} of {self.positions:,} top-k sets differ, by at most "
            f"{self.outranked.largest:.5f} nats between a token left out and one cached",
            f"allowed   largest {largest:.5f}, mean {mean:.6f} nats: rounding in {dtype}",
        ]


def refuse_other(cache: TeacherCache, field: str, own: object, where: Path, teacher: str, or_else: str = "") -> None:
    """UserError where what the cache `where` says in a field of its manifest is not `teacher`'s own."""
    said = cache.manifest.get(field)
    if said != own:
        raise UserError(f"{where / MANIFEST}: {field} is {said!r}, but {teacher} has {own!r}; {REMAKE}{or_else}")


def replay(
    model: LanguageModel,
    cache: TeacherCache,
    shards: TokenShards,
    windows: np.ndarray,
    batch_rows: int,
    progress: Callable[[int], object] = lambda tokens: None,
    projection: Projection | None = None,
) -> Replay:
    """Run `windows` through the teacher and compare every position with its record.

    Args:
        progress: told the tokens done.
    """
    identity, layout, device = cache.identity, cache.identity.layout, next(model.parameters()).device
    found = Replay(identity.temperatures, projection)
    for start in range(0, len(windows), batch_rows):
        batch = read_batch(shards, windows[start : start + batch_rows], identity.seq_len)
        records, gold = cache.read(batch.windows), torch.from_numpy(cache.gold(batch.windows)).flatten()
        tokens, places = batch.tokens, torch.arange(len(records))
        states = places
        if projection:
            aligned, marks = projection.align(batch), layout.unpack(records).covered
            covered = torch.from_numpy(aligned.covered)
            found.changed_marks += int((marks != covered).sum())
            tokens, places, states = aligned.tokens, (covered & marks).nonzero()[:, 0], aligned.states[marks[covered]]
        with torch.inference_mode():
            hidden = model.hidden(tokens.to(device)).flatten(0, 1)
            for i in range(0, len(places), ROWS):
                part, state = places[i : i + ROWS], states[i : i + ROWS].to(device)
                said = layout.unpack(records[part].to(device)), gold[part].to(device)
                targets = batch.targets.flatten()[part].to(device)
                found.add(model.logits(hidden[state]), targets, *said)
        progress(len(batch.windows) * identity.seq_len)
    return found


def _projected(z: Tensor, projection: Projection) -> Tensor:
    """Logits [n, U] over the teacher's tokens -> log-probabilities [n, V] over the student's."""
    p = z.new_zeros(len(z), projection.n_vocab)
    p.scatter_add_(1, projection.first.to(z.device).expand(len(z), -1), z.log_softmax(-1).exp())
    return p.log().clamp_min(SMALLEST)
