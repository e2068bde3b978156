"""The capped tail: the tightest lower bound of a divergence that a top-k cache allows.

The cache certifies more than the tail's mass p_t: no token outside the k cached ones is likelier than the k-th, tau.
Among all teachers that agree with the cache, the one nearest to the student has on the tail

    p*_j = min(tau, c q_j),  c such that they sum to p_t   (the KKT conditions; the same p* for every f-divergence)

and p* is a constant in the gradient (Danskin's theorem). Where no student tail token exceeds its cap, c = p_t / q_t and
the divergence is the lumped one.

c is found by Newton's method. F(c) = sum_j min(tau, c q_j) is concave and piecewise linear, so that the iterates rise
to the solution without passing it, and reach it exactly in the piece that holds it.

Few tokens are capped, about ten of a row's. The largest logit of each group of 64, which the first sweep over the
vocabulary leaves behind, tells where they can be: only those groups' logits are made again, and the rest is arithmetic
on single tokens. For memory this is one number for 64 logits. A device that sweeps over all logits faster than it
picks some of them takes each of Newton's steps as a sweep.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.divergences import LARGEST_LOG_RATIO
from microlm.objective.vocabulary_blocks import EAGER, GROUP, LOWEST, AnyEntries, Entries, VocabularyBlocks, kernel

CANCELLING = 0.1  # share of the tail's mass below which a difference of sums has too few digits
MARGIN = 0.5  # of log c: how far above the iterate the first round looks; each round doubles it
TILE, TILES = 32, 128  # rows in a product with one group's weights, and such products at once
MOST_PAIRS = 2**17  # of a row and a group, at once: 8M logits


def cap_tail(log_p: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
    """p* over the whole vocabulary, by sorting: the dense oracle.

    Args:
        log_p: what the cache says, [..., k + 1], the tail's log-mass last.
        ids: int64 [..., k].
        log_q: the student, [..., V].

    Returns:
        log p* [..., V].
    """
    head, tail_mass = log_p[..., :-1], log_p[..., -1:].exp()
    n_tail = log_q.shape[-1] - ids.shape[-1]
    if n_tail == 0:
        return torch.empty_like(log_q).scatter(-1, ids, head)
    tau = torch.maximum(head.amin(-1, keepdim=True).exp(), tail_mass / n_tail)
    q = log_q.exp().scatter(-1, ids, -1.0).sort(-1, descending=True).values[..., :n_tail]
    capped = torch.arange(n_tail, device=log_q.device)
    rest = q.flip(-1).cumsum(-1).flip(-1)  # mass of the tail from the n-th largest on
    c = (tail_mass - capped * tau) / rest
    fits = (c * q <= tau * (1 + 1e-12)) | (capped == n_tail - 1)
    first = fits.to(torch.int8).argmax(-1, keepdim=True)
    log_c = c.gather(-1, first).clamp_min(torch.finfo(c.dtype).tiny).log()
    return torch.minimum(tau.log(), log_c + log_q).scatter(-1, ids, head)


@dataclass
class Tokens:
    """Single tokens of some rows; all [M]."""

    rows: Tensor
    ids: Tensor
    log_q: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Tokens"]) -> "Tokens":
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "ids", "log_q")))

    def sum(self, values: Tensor, n_rows: int) -> Tensor:
        """Sums of `values` [M] over each row's tokens, [n_rows]."""
        return values.new_zeros(n_rows).index_add_(0, self.rows, values)

    def of(self, chosen: Tensor) -> "Tokens":
        return Tokens(self.rows[chosen], self.ids[chosen], self.log_q[chosen])


@dataclass
class CappedTail:
    """p* of N rows: exp(log_tau) on the capped tokens, exp(log_c) q elsewhere on the tail."""

    log_c: Tensor  # [N]
    log_tau: Tensor  # [N]
    uncapped_mass: Tensor  # of the student, [N]
    capped: Tokens


class _Tail:
    """The students' tails, token by token where the group's largest logit asks for it."""

    def __init__(self, blocks: VocabularyBlocks, ids: Tensor, log_normalizer: Tensor, largest: Tensor, scale: float):
        self._blocks, self._ids, self._scale = blocks, ids, scale
        self._log_normalizer, self._largest = log_normalizer, largest - log_normalizer[:, None]

    def above(self, rows: Tensor, threshold: Tensor) -> Tokens:
        """Tokens of `rows` [R] with log q above `threshold` [R]; their `rows` count from 0 to R - 1."""
        flagged = self._largest[rows] > threshold[:, None]
        found = [self._of_part(rows, threshold, flagged, part) for part in _parts(flagged.sum(-1))]
        return Tokens.joined(found)

    def all_but(self, rows: Tensor, known: Tokens, tail_mass: Tensor) -> Tensor:
        """The student's mass on the tails of `rows` [R], of `tail_mass` [R], that is not on the `known` tokens."""
        mass = tail_mass - known.sum(known.log_q.exp(), len(rows))
        few = torch.nonzero(mass < CANCELLING * tail_mass)[:, 0]
        if not len(few):
            return mass
        place = torch.full_like(rows, -1).scatter(0, few, torch.arange(len(few), device=rows.device))
        known = known.of(place[known.rows] >= 0)
        blocks = VocabularyBlocks(self._blocks.hidden[rows[few]], self._blocks.weight, self._blocks.n_vocab)
        left_out = (Entries(self._ids[rows[few]], blocks), Entries(known.ids, blocks, place[known.rows]))
        peak, total = blocks.filled(LOWEST), blocks.filled(0)
        for index, _, z in blocks:
            for entries in left_out:
                r, c, _ = entries.at(index)
                z[r, c] = -torch.inf
            EAGER["update_statistics"](z, self._scale, peak, total)
        mass[few] = (peak + total.log() - self._log_normalizer[rows[few]]).exp()
        return mass

    def _of_part(self, rows: Tensor, threshold: Tensor, flagged: Tensor, part: slice) -> Tokens:
        group, row = flagged[part].T.nonzero(as_tuple=True)  # in the order of groups
        row = row + part.start
        cached = self._cached_bits(rows, row, group, flagged.shape[1])
        pairs, of_tile = _tiles(group, flagged.shape[1])
        within = torch.arange(GROUP, device=rows.device)
        last = self._blocks.n_vocab - 1
        found = []
        for chosen, groups in zip(pairs.split(TILES), of_tile.split(TILES), strict=True):
            present = chosen >= 0
            columns = groups[:, None] * GROUP + within
            at = row[chosen.clamp_min(0)]
            hidden, weight = self._blocks.hidden[rows[at]], self._blocks.weight[columns.clamp_max(last)]
            z = torch.bmm(hidden, weight.transpose(1, 2)).to(threshold.dtype) * self._scale
            log_q = z - self._log_normalizer[rows[at]][..., None]
            hit = (log_q > threshold[at][..., None]) & present[..., None] & (columns <= last)[:, None]
            tile, place, column = hit.nonzero(as_tuple=True)
            new = (cached[chosen[tile, place]] >> column) & 1 == 0
            tile, place, column = tile[new], place[new], column[new]
            found.append(Tokens(at[tile, place], columns[tile, column], log_q[tile, place, column]))
        return Tokens.joined(found)

    def _cached_bits(self, rows: Tensor, row: Tensor, group: Tensor, n_groups: int) -> Tensor:
        """For each pair of a row and a group, a bit for each of its ids that is cached: int64 [pairs]."""
        pair_of = torch.full((len(rows), n_groups), -1, dtype=torch.int32, device=rows.device)
        pair_of[row, group] = torch.arange(len(row), dtype=torch.int32, device=rows.device)
        ids = self._ids[rows]
        pair = pair_of.gather(1, ids // GROUP)
        inside = pair >= 0
        bit = torch.ones_like(ids[inside]) << (ids[inside] % GROUP)
        return torch.zeros_like(row).index_add_(0, pair[inside].long(), bit)


def _parts(pairs_of_row: Tensor) -> Iterator[slice]:
    """Runs of rows with not many more than MOST_PAIRS pairs each."""
    _, lengths = torch.unique_consecutive(pairs_of_row.cumsum(0) // MOST_PAIRS, return_counts=True)
    start = 0
    for length in lengths.tolist():
        yield slice(start, start + length)
        start += length


def _tiles(group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Pairs of one group in rows of TILE, -1 where there are no more, and each tile's group; a multiple of TILES."""
    pairs = torch.bincount(group, minlength=n_groups)
    tiles = (pairs + TILE - 1) // TILE
    of_tile = torch.repeat_interleave(torch.arange(n_groups, device=group.device), tiles)
    place = torch.arange(len(of_tile), device=group.device) - (tiles.cumsum(0) - tiles)[of_tile]
    offset = place[:, None] * TILE + torch.arange(TILE, device=group.device)
    pair = torch.where(offset < pairs[of_tile][:, None], (pairs.cumsum(0) - pairs)[of_tile][:, None] + offset, -1)
    missing = -len(of_tile) % TILES  # the same shapes always: the CPU's products prepare themselves for each
    pair = torch.cat((pair, pair.new_full((missing, TILE), -1)))
    return pair, torch.cat((of_tile, of_tile.new_zeros(missing)))


def solve(
    blocks: VocabularyBlocks,
    ids: Tensor,
    log_p: Tensor,
    log_normalizer: Tensor,
    log_tail: Tensor,
    largest: Tensor,
    scale: float,
) -> CappedTail:
    """Water-filling.

    Args:
        ids: int64 [N, k], k < V.
        log_p: the cache's [N, k + 1].
        log_normalizer: of the student over the vocabulary, in units of scale * z, [N].
        log_tail: the same over the tail, [N].
        largest: the largest scaled logit of the tail in each group of the vocabulary, [N, G].
        scale: 1 / temperature.
    """
    tail_mass = (log_tail - log_normalizer).exp()
    log_mass, log_tau, log_c = _start(blocks.n_vocab - ids.shape[1], log_p, log_normalizer, log_tail)
    uncapped_mass = tail_mass.clone()
    tail = _Tail(blocks, ids, log_normalizer, largest, scale)
    left = torch.nonzero(log_c + largest.amax(-1) - log_normalizer > log_tau)[:, 0]
    capped, margin = [], MARGIN
    while len(left):
        known_to = log_c[left] + margin
        known = tail.above(left, log_tau[left] - known_to)
        rest = tail.all_but(left, known, tail_mass[left])
        log_c[left], above, mass = _newton(known, rest, log_c[left], log_tau[left], log_mass[left])
        solved = log_c[left] <= known_to  # otherwise tokens that are not known may be capped, and log_c is too low
        uncapped_mass[left[solved]] = mass[solved]
        chosen = known.of(above & solved[known.rows])
        capped.append(Tokens(left[chosen.rows], chosen.ids, chosen.log_q))
        left, margin = left[~solved], margin * 2
    if not capped:
        capped.append(Tokens(left, left, log_c[left]))
    return CappedTail(log_c, log_tau, uncapped_mass, Tokens.joined(capped))


def solve_by_sweeps(
    blocks: VocabularyBlocks,
    cached: AnyEntries,
    log_p: Tensor,
    log_normalizer: Tensor,
    log_tail: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Water-filling where a sweep over all logits costs less than to pick tokens: log c and log tau, both [N].

    Arguments as `solve`. Each of Newton's steps is a sweep, after which the host looks once whether any row moved.
    """
    log_mass, log_tau, log_c = _start(blocks.n_vocab - log_p.shape[1] + 1, log_p, log_normalizer, log_tail)
    tiny, before = torch.finfo(log_c.dtype).tiny, None
    add = kernel("add_capped", lambda: add_capped)
    while True:
        count, mass = torch.zeros_like(log_c), torch.zeros_like(log_c)
        for index, _, z in blocks:
            cached.write(index, z, -torch.inf)
            add(z, scale, log_normalizer, log_tau - log_c, count, mass)
        if before is not None and torch.equal(count, before):  # as `_newton`: as many as before are the same ones
            return log_c, log_tau
        log_c, before = _raised(log_c, count, mass.clamp_min(tiny), log_tau, log_mass), count


def add_capped(z: Tensor, scale: float, log_normalizer: Tensor, threshold: Tensor, count: Tensor, mass: Tensor) -> None:
    """A pass that adds how many tokens of each row have log q above its threshold [N], and the others' mass."""
    log_q = z.to(mass.dtype) * scale - log_normalizer[:, None]
    above = log_q > threshold[:, None]
    count += above.to(mass.dtype).sum(-1)
    mass += torch.where(above, 0.0, torch.exp(log_q)).sum(-1)


def _start(n_tail: int, log_p: Tensor, log_normalizer: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tail's log-mass, its cap, and log c where no token exceeds it, each [N]."""
    log_mass = log_p[:, -1]
    log_tau = torch.maximum(log_p[:, :-1].amin(-1), log_mass - math.log(n_tail))
    return log_mass, log_tau, (log_mass - (log_tail - log_normalizer)).clamp_max(LARGEST_LOG_RATIO)


def _raised(log_c: Tensor, count: Tensor, left: Tensor, log_tau: Tensor, log_mass: Tensor) -> Tensor:
    """Newton's step: log c where `count` tokens are capped and the student has mass `left` on the others."""
    missing = (log_mass.exp() - count * log_tau.exp()).clamp_min(torch.finfo(log_c.dtype).tiny)
    return torch.maximum(log_c, (missing / left).log().clamp_max(LARGEST_LOG_RATIO))


def _newton(
    known: Tokens, rest: Tensor, log_c: Tensor, log_tau: Tensor, log_mass: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log c of R rows where of the tail none but `known` tokens is capped, which of them are, and the student's mass on
    the rest of the tail, of which `rest` [R] is on tokens that are not known.
    """
    tiny = torch.finfo(log_c.dtype).tiny
    q, n_rows, before = known.log_q.exp(), len(log_c), None
    while True:  # c only rises, so that the tokens above the cap only grow more; as many as before are the same ones
        above = known.log_q > (log_tau - log_c)[known.rows]
        count = known.sum(above.to(q.dtype), n_rows)
        left = (rest + known.sum(torch.where(above, 0.0, q), n_rows)).clamp_min(tiny)
        if before is not None and torch.equal(count, before):
            return log_c, above, left
        log_c, before = _raised(log_c, count, left, log_tau, log_mass), count
