"""Is this cache that teacher's? Replay windows through the live teacher and hold the records against it.

The replay does not use the capture's code: it takes the whole vocabulary's log-probabilities and reads from them what a
record claims. Ids are compared through their log-probabilities alone, for tokens of equal logits may swap places.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
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


class Said(NamedTuple):
    """What a cache says of N positions."""

    columns: Columns
    gold: Tensor  # float32 [N]

    @classmethod
    def of(cls, cache: TeacherCache, windows: np.ndarray, device: torch.device) -> "Said":
        gold = torch.from_numpy(cache.gold(windows)).flatten().to(device)
        return cls(cache.identity.layout.unpack(cache.read(windows).to(device)), gold)

    def at(self, places: slice | np.ndarray) -> "Said":
        def part(column: Tensor | None) -> Tensor | None:
            return None if column is None else column[places]

        columns = Columns(**{name: part(column) for name, column in vars(self.columns).items()})
        return Said(columns, self.gold[places])


@dataclass
class Replay:
    """Live against cached.

    `outranked`: how far the likeliest token outside the cached ids stands above the least likely one inside.
    `changed_marks`: positions that are covered in one and not in the other.
    """

    log_p: Spread = field(default_factory=Spread)
    log_tail: Spread = field(default_factory=Spread)
    gold: Spread = field(default_factory=Spread)
    outranked: Spread = field(default_factory=Spread)
    changed_sets: int = 0
    changed_marks: int = 0
    positions: int = 0
    logit_scale: float = 0.0

    def add(self, logits: Tensor, targets: Tensor, said: "Said", temperatures: tuple[float, ...]) -> None:
        """logits [N, V], targets int64 [N], what the cache said of these positions."""
        z, (cached, said_gold) = logits.float(), said
        ids = cached.ids
        peak, log_normalizer = z.amax(-1), z.logsumexp(-1)
        log_p = z.gather(1, ids) - log_normalizer[:, None]
        gold = z.gather(1, targets[:, None])[:, 0] - log_normalizer
        self.log_p.add(((log_p - cached.log_p).abs() - cached.rounding).clamp_min(0))
        self.gold.add((gold - said_gold).abs())
        self.positions += len(z)
        self.logit_scale = max(self.logit_scale, float(z.abs().max()))
        if ids.shape[1] == z.shape[1]:
            return  # no tail and nothing outside
        rest = z.scatter(1, ids, -torch.inf)
        outranking = rest.amax(-1) - z.gather(1, ids).amin(-1)
        self.outranked.add(outranking.clamp_min(0))
        self.changed_sets += int((outranking > 0).sum())
        for column, temperature in enumerate(temperatures):
            tail = ((rest - peak[:, None]) / temperature).logsumexp(-1).clamp_min(SMALLEST)
            live = tail - (log_normalizer - peak) / temperature
            # below temperature 1 logits are stretched, and their rounding with them
            self.log_tail.add((live - cached.log_tail[:, column]).abs() * min(1.0, temperature))

    def add_projected(self, log_p: Tensor, targets: Tensor, said: "Said", column: int, temperature: float) -> None:
        """One temperature. log_p [n, V] of the projected teacher, targets int64 [n]; all positions are covered."""
        cached, said_gold = said
        ids, stretch = cached.ids[:, column], min(1.0, temperature)
        head = log_p.gather(1, ids)
        off = (head - cached.log_p[:, column]).abs() - cached.rounding[:, column]
        self.log_p.add(off.clamp_min(0) * stretch)
        if temperature == 1:
            self.gold.add((log_p.gather(1, targets[:, None])[:, 0] - said_gold).abs())
            self.positions += len(log_p)
        if ids.shape[1] == log_p.shape[1]:
            return
        rest = log_p.scatter(1, ids, -torch.inf)
        outranking = (rest.amax(-1) - head.amin(-1)) * stretch
        self.outranked.add(outranking.clamp_min(0))
        self.changed_sets += int((outranking > 0).sum()) if temperature == 1 else 0
        tail = rest.logsumexp(-1).clamp_min(SMALLEST)
        self.log_tail.add((tail - cached.log_tail[:, column]).abs() * stretch)

    def excess(self, dtype: torch.dtype) -> str | None:
        """What differs by more than rounding in `dtype` explains, in words; None where nothing does."""
        if self.changed_marks:
            return f"which positions it covers, {self.changed_marks:,} of them"
        largest, mean = allowed_nats(dtype, self.logit_scale)
        for name in FIELDS:
            spread: Spread = getattr(self, name)
            if not (spread.largest <= largest and spread.mean <= mean):  # a NaN is an excess too
                return f"{name} by up to {spread.largest:.3g} nats, {spread.mean:.3g} on average"
        if not self.outranked.largest <= largest:
            return f"which ids are the likeliest, by up to {self.outranked.largest:.3g} nats"
        return None

    def refuse_excess(self, dtype: torch.dtype, where: Path, teacher: str) -> None:
        """UserError, one line, where the cache `where` is not what `teacher` says now."""
        excess = self.excess(dtype)
        if excess:
            largest, mean = allowed_nats(dtype, self.logit_scale)
            raise UserError(
                f"{where}: {teacher} differs in {excess}, where rounding explains {largest:.3g} and {mean:.3g}: it is "
                f"another teacher's cache or one made wrong; {REMAKE}"
            )

    def lines(self, dtype: torch.dtype) -> list[str]:
        """What was found, for a person."""
        largest, mean = allowed_nats(dtype, self.logit_scale)
        spreads = ((name, getattr(self, name)) for name in FIELDS)
        return [
            *(f"{name:<9} largest {s.largest:.5f}, mean {s.mean:.6f} nats, live against cached" for name, s in spreads),
            f"ids       {self.changed_sets:,} of {self.positions:,} top-k sets differ, by at most "
            f"{self.outranked.largest:.5f} nats between a token left out and one cached",
            f"allowed   largest {largest:.5f}, mean {mean:.6f} nats: rounding in {dtype}",
        ]


def refuse_other_weights(cache: TeacherCache, fingerprint: str, where: Path, teacher: str) -> None:
    """UserError where the cache names the fingerprint of other weights than `teacher`'s."""
    if cache.manifest["weights_sha256"] != fingerprint:
        raise UserError(
            f"{where / MANIFEST}: weights_sha256 is {cache.manifest['weights_sha256']!r}, but {teacher} has "
            f"{fingerprint!r}; {REMAKE}, or compare by replay alone with --replay-only"
        )


def refuse_other_tokenizer(cache: TeacherCache, projection: Projection | None, where: Path, teacher: str) -> None:
    """UserError where the cache is not of a teacher with `teacher`'s tokenizer, None where that is the corpus's."""
    own = projection.teacher.fingerprint if projection else None
    if cache.identity.teacher_tokenizer != own:
        raise UserError(
            f"{where / MANIFEST}: teacher_tokenizer is {cache.identity.teacher_tokenizer!r}, but {teacher} has "
            f"{own!r}; {REMAKE}"
        )


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
        projection: of a teacher with another tokenizer than the shards'.
    """
    found, device = Replay(), next(model.parameters()).device
    seq_len = cache.identity.seq_len
    for start in range(0, len(windows), batch_rows):
        batch = read_batch(shards, windows[start : start + batch_rows], seq_len)
        said, targets = Said.of(cache, batch.windows, device), batch.targets.to(device).flatten()
        with torch.inference_mode():
            if projection:
                _replay_projected(found, model, cache, batch, said, projection)
            else:
                hidden = model.hidden(batch.tokens.to(device)).flatten(0, 1)
                for i in range(0, len(hidden), ROWS):
                    part = slice(i, i + ROWS)
                    found.add(model.logits(hidden[part]), targets[part], said.at(part), cache.identity.temperatures)
        progress(len(batch.windows) * seq_len)
    return found


def _replay_projected(
    found: Replay,
    model: LanguageModel,
    cache: TeacherCache,
    batch: Batch,
    said: "Said",
    projection: Projection,
) -> None:
    device, aligned = next(model.parameters()).device, projection.align(batch)
    marks = said.columns.covered.cpu().numpy()
    found.changed_marks += int((marks != aligned.covered).sum())
    both = marks[aligned.covered]  # of the positions that the live teacher covers
    states = aligned.states[torch.from_numpy(both)].to(device)
    places = np.flatnonzero(aligned.covered & marks)
    hidden = model.hidden(aligned.tokens.to(device)).flatten(0, 1)[states]
    targets, first = batch.targets.flatten()[places].to(device), projection.first.to(device)
    for i in range(0, len(hidden), ROWS):
        part = slice(i, i + ROWS)
        z = model.logits(hidden[part])[:, : len(first)].float()
        found.logit_scale = max(found.logit_scale, float(z.abs().max()))
        for column, temperature in enumerate(cache.identity.temperatures):
            p = z.new_zeros(len(z), projection.n_vocab)
            p.scatter_add_(1, first.expand(len(z), -1), (z / temperature).log_softmax(-1).exp())
            log_p = p.log().clamp_min(SMALLEST)
            found.add_projected(log_p, targets[part], said.at(places[part]), column, temperature)
