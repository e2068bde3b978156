"""Every layout of a cache that is measured: what of the teacher it keeps, in how many bytes, and how it is read.

Peers are charged what their own layouts cost and are given exact values where that is less work than their coding of
them: both favor them. Ours are quantized as they would lie on the disk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from microlm.objective.divergences import temper
from microlm.research.probe import closed_form_gradients
from microlm.research.probe.closed_form_gradients import Target, Treatment, cap
from microlm.research.probe.dense_positions import DensePositions
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.records import decode, encode

Keep = Callable[[DensePositions, int, Generator], Target]
SMALLEST_TAIL = 1e-8  # to which Megatron-LM clamps one minus the sum of its head
FLOOR_NATS = -100.0  # NeMo-RL's `log_infinitesimal`
DIRECTIONS_AN_ENTRY = 8  # of a code, for each entry of the head: of 2 bits each, 2 bytes more an entry
FORWARD, CONDITIONAL = closed_form_gradients.forward_kl, closed_form_gradients.conditional_reverse_kl
BOTH = {"forward": FORWARD, "reverse": closed_form_gradients.reverse_kl}
WITHOUT_TAIL = {"forward": FORWARD, "reverse": CONDITIONAL}
DROPPED = {"forward": FORWARD, "reverse": closed_form_gradients.dropped_reverse_kl}


@dataclass(frozen=True)
class Method:
    """A record layout with a reading of it for each direction of KL that it serves."""

    name: str
    origin: str  # "ours", or whose it is
    keep: Keep
    token_bytes: Callable[[int, float], float]  # (k, mean listed entries) -> bytes a token
    read: Mapping[str, Treatment]
    bracket: bool = False  # its value is a lower bound, and its forward KL has a certified upper one
    ks: tuple[int, ...] | None = None  # the only ones to measure


def record_bytes(k: int, kind: str = "full") -> int:
    """Bytes of the cache's own record of k entries, ids of two bytes, at one temperature."""
    return CacheIdentity("", None, "", 2**16, "", 1, 1, k, (1.0,), kind).token_bytes


def completed(at: DensePositions, log_p_head: Tensor, log_tail: Tensor, shape: str = "student") -> Target:
    """The head as recorded and the tail's mass spread as `shape` says, renormalized as a reader does.

    Args:
        log_p_head: [N, k] of the k most likely tokens.
        log_tail: [N].
    """
    k = log_p_head.shape[1]
    recorded = temper(log_p_head.to(at.log_p.dtype), log_tail.to(at.log_p.dtype), 1.0)
    ids = at.ranked_ids[:, :k]
    f_tail = (1 - at.shape(shape).log_f.gather(-1, ids).exp().sum(-1)).clamp_min(torch.finfo(at.log_q.dtype).tiny)
    return Target(ids, recorded[:, :k], recorded[:, k] - f_tail.log(), torch.ones_like(ids, dtype=torch.bool), shape)


def ours(
    name: str, kind: str = "full", shape: str = "student", bounded: bool = False, ks: tuple[int, ...] | None = None
) -> Method:
    """Our record of a `kind`. `shape`: "code" stands for one of as many directions as the record's entries allow."""

    def keep(at: DensePositions, k: int, _: Generator) -> Target:
        head = at.ranked_log_p[:, :k]
        log_p = decode(encode(head)) if kind == "compact" else head.half()
        spread = f"code{DIRECTIONS_AN_ENTRY * k}" if shape == "code" else shape
        tail = at.cumulative[:, -1] - at.cumulative[:, k - 1]  # exactly 0 where k is the whole vocabulary
        target = completed(at, log_p, tail.log().float(), spread)
        return cap(target, at) if bounded else target

    def token_bytes(k: int, _: float) -> float:
        return record_bytes(k, kind) + (2 * k if shape == "code" else 0)

    return Method(name, "ours", keep, token_bytes, BOTH, bracket=shape == "student", ks=ks)


LUMPED = ours("lumped")


def ghost(at: DensePositions, k: int, _: Generator) -> Target:
    """Megatron-LM: float16 head, tail as one minus its sum."""
    head = at.ranked_log_p[:, :k].half().double()
    return completed(at, head, (1 - head.exp().sum(-1)).clamp_min(SMALLEST_TAIL).log())


def without_tail(ids: Tensor, log_p: Tensor) -> Target:
    """No mass off the list."""
    return Target(ids, log_p, torch.full_like(log_p[:, 0], -torch.inf), torch.ones_like(ids, dtype=torch.bool))


def head_alone(at: DensePositions, k: int, _: Generator) -> Target:
    return without_tail(at.ranked_ids[:, :k], at.ranked_log_p[:, :k])


def floored(at: DensePositions, k: int, draws: Generator) -> Target:
    """NeMo-RL, `zero_outside_topk`: log t = FLOOR_NATS off the list."""
    head = head_alone(at, k, draws)
    return replace(head, log_c=torch.full_like(head.log_c, FLOOR_NATS), shape="flat")


def renormalized(at: DensePositions, k: int, _: Generator) -> Target:
    return without_tail(at.ranked_ids[:, :k], at.ranked_log_p[:, :k].log_softmax(-1))


def counted(ids: Tensor, mass_of_one: Tensor, log_c: Tensor) -> Target:
    """Draws [N, n], each worth `mass_of_one` [N], with repeated ids put together."""
    ids = ids.sort(-1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = (ids[:, :, None] == ids[:, None, :]).sum(-1)
    log_p = counts.to(mass_of_one.dtype).log() + mass_of_one.log()[:, None]
    return Target(ids, log_p, log_c, first)


def drawn_at(at: DensePositions, points: Tensor) -> Tensor:
    """Ids [N, n] at `points` [N, n] of the teacher's cumulative distribution, most likely tokens first."""
    ranks = torch.searchsorted(at.cumulative, points).clamp_max(at.log_p.shape[1] - 1)
    return at.ranked_ids.gather(-1, ranks)


def random_sampling(at: DensePositions, n: int, draws: Generator) -> Target:
    """Random-sampling KD (Anshumann et al. 2025, arXiv:2503.16870): n draws with replacement, counts / n as target."""
    total = at.cumulative[:, -1:]
    ids = drawn_at(at, torch.rand(len(total), n, generator=draws, dtype=total.dtype, device=total.device) * total)
    return counted(ids, torch.full_like(total[:, 0], 1 / n), torch.full_like(total[:, 0], -torch.inf))


def tail_samples(
    at: DensePositions, certain: Tensor, size: Tensor, width: int, draws: Generator
) -> tuple[Tensor, Tensor]:
    """Systematic sampling of the tail past the first `certain` ranks: one random start, then even steps of its mass.

    Args:
        certain: [N] ranks left out; size: [N] samples wanted, of which a row of `width` holds at most `width`.

    Returns:
        ids int64 [N, width] (those past `size` mean nothing) and the mass p_t / size that each stands for, [N]. A token
        is drawn size * p / p_t times on average: unbiased whatever p.
    """
    before = torch.where(certain > 0, at.cumulative.gather(-1, (certain - 1).clamp_min(0)[:, None])[:, 0], 0.0)
    step = (at.cumulative[:, -1] - before) / size.clamp_min(1)
    start = torch.rand(len(before), 1, generator=draws, dtype=before.dtype, device=before.device)
    places = torch.arange(width, device=before.device) + start
    return drawn_at(at, before[:, None] + places * step[:, None]), step


def threshold_sampling(at: DensePositions, n: int, draws: Generator) -> Target:
    """Threshold (PPS, VarOpt) sampling (Duffield et al. 2007): n entries kept with probability min(1, p / t), each
    standing for max(p, t).

    The threshold t is the tail's mass over the entries left for it, after the tokens above t took theirs.
    """
    certain = torch.arange(n, device=at.log_p.device)
    before = at.cumulative[:, :n] - at.ranked_log_p[:, :n].exp()
    thresholds = (at.cumulative[:, -1:] - before) / (n - certain)
    taken = (at.ranked_log_p[:, :n].exp() >= thresholds).long().cumprod(-1).sum(-1)
    ids, step = tail_samples(at, taken, n - taken, n, draws)
    sure = certain < taken[:, None]
    ids = torch.where(sure, at.ranked_ids[:, :n], ids.gather(-1, (certain - taken[:, None]).clamp_min(0)))
    log_p = torch.where(sure, at.ranked_log_p[:, :n], step.log()[:, None])
    return without_tail(ids, log_p)


def head_and_samples(lumped_share: float) -> Keep:
    """Exact head, and k samples of the tail with `1 - lumped_share` of its mass; the rest spread as the student's."""

    def keep(at: DensePositions, k: int, draws: Generator) -> Target:
        head = LUMPED.keep(at, k, draws)
        certain = torch.full_like(head.ids[:, 0], k)
        ids, step = tail_samples(at, certain, certain, k, draws)
        tail = counted(ids, step * (1 - lumped_share), head.log_c)
        log_c = head.log_c + torch.log(torch.tensor(lumped_share, dtype=head.log_c.dtype))
        spread = log_c[:, None] + at.log_q.gather(-1, tail.ids)
        return head.joined(tail.ids, torch.logaddexp(tail.log_p, spread), tail.listed, log_c)

    return keep


DRAWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)  # with replacement: distinct ids are far fewer
METHODS = (
    LUMPED,
    ours("capped", bounded=True),
    ours("compact lumped", "compact"),
    ours("compact capped", "compact", bounded=True),
    Method("head + samples", "ours", head_and_samples(0.0), lambda k, _: record_bytes(k) + 2 * k, {"forward": FORWARD}),
    Method("head + samples, half lumped", "ours", head_and_samples(0.5), lambda k, _: record_bytes(k) + 2 * k, BOTH),
    # packed 16-bit ids and a fitted curve, its two published layouts: 114 bytes at k = 50 and 312 at k = 128
    Method("renormalized", "DistillKit, axolotl", renormalized, lambda k, _: 2 * k + (14, 56)[k > 64], WITHOUT_TAIL),
    Method("dropped", "verl", head_alone, lambda k, _: 4 * k, DROPPED),
    Method("floored", "NeMo-RL", floored, lambda k, _: 4 * k, {"reverse": BOTH["reverse"]}),
    Method("ghost token", "Megatron-LM", ghost, lambda k, _: 5 * k, BOTH),
    Method("random sampling", "RS-KD", random_sampling, lambda _, listed: 3 * listed, WITHOUT_TAIL, ks=DRAWS),
    Method("threshold sampling", "VarOpt", threshold_sampling, lambda k, _: 4 * k, WITHOUT_TAIL),
    ours("table tail", shape="table"),
    ours("compact table tail", "compact", "table"),
    ours("code tail", "compact", "code", bounded=True, ks=(4, 8, 16, 32)),
)
