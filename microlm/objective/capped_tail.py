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
on single tokens. For memory this is one number for 64 logits. Each of Newton's steps is a sweep instead where that is
faster: on a device that sweeps over all logits sooner than it picks some of them, and where most groups hold a capped
token, as under a teacher that is sure of one token and leaves the rest a flat tail.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from microlm.objective.divergences import LARGEST_LOG_RATIO
from microlm.objective.vocabulary_blocks import GROUP, Entries, StudentRows, VocabularyBlocks, kernel, update_statistics

CANCELLING = 0.1  # share of the tail's mass below which a difference of sums has too few digits
MARGIN = 0.5  # of log c: how far above the iterate the first round looks; each round doubles it
TILE, TILES = 32, 128  # rows in a product with one group's weights, and such products at once
MOST_PICKED = 0.6  # of all groups of all rows: beyond that share, Newton's steps as sweeps cost less
MOST_PAIRS = 2**17  # of a row and a group, at once: 8M logits

Measure = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Of thresholds [R] for log q: how many of a row's tail tokens are above, and the student's mass on the others."""


class Tokens(NamedTuple):
    """Single tokens of some rows; all [M]."""

    rows: Tensor
    ids: Tensor
    log_q: Tensor

    def sum(self, values: Tensor, n_rows: int) -> Tensor:
        """Sums of `values` [M] over each row's tokens, [n_rows]."""
        return values.new_zeros(n_rows).index_add_(0, self.rows, values)

    def of(self, chosen: Tensor) -> "Tokens":
        return Tokens(self.rows[chosen], self.ids[chosen], self.log_q[chosen])


def joined(parts: Iterable[Tokens]) -> Tokens:
    return Tokens(*map(torch.cat, zip(*parts)))


@dataclass
class CappedTail:
    """p* of N rows: exp(log_tau) on the capped tokens, exp(log_c) q elsewhere on the tail."""

    log_c: Tensor  # [N]
    log_tau: Tensor  # [N]
    uncapped_mass: Tensor  # of the student, [N]
    capped: Tokens


def solve(student: StudentRows, log_p: Tensor) -> CappedTail | None:
    """Water-filling for the cache's log_p [N, k + 1], by looking at the tokens that may be capped.

    None where these are in more groups than is worth picking.
    """
    log_mass, log_tau, log_c = _uncapped(student, log_p)
    log_normalizer = student.tempered_normalizer
    tail_mass = (student.log_tail - log_normalizer).exp()
    uncapped_mass = tail_mass.clone()
    left = torch.nonzero(log_c + student.largest.amax(-1) - log_normalizer > log_tau)[:, 0]
    capped, margin = [Tokens(left[:0], left[:0], log_c[:0])], MARGIN
    while len(left):
        known_to = log_c[left] + margin
        threshold = log_tau[left] - known_to
        flagged = student.largest[left] - student.tempered_normalizer[left, None] > threshold[:, None]
        if flagged.sum() > MOST_PICKED * student.largest.numel():
            return None
        known = joined(_tokens_above(student, left, threshold, flagged))
        rest = _mass_without(student, left, known, tail_mass[left])
        log_c[left], mass = _newton(partial(_measure_known, known, rest), log_c[left], log_tau[left], log_mass[left])
        solved = log_c[left] <= known_to  # otherwise tokens that are not known may be capped, and log_c is too low
        uncapped_mass[left[solved]] = mass[solved]
        above = known.log_q > (log_tau[left] - log_c[left])[known.rows]
        chosen = known.of(above & solved[known.rows])
        capped.append(Tokens(left[chosen.rows], chosen.ids, chosen.log_q))
        left, margin = left[~solved], margin * 2
    return CappedTail(log_c, log_tau, uncapped_mass, joined(capped))


def solve_by_sweeps(student: StudentRows, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Water-filling where a sweep over all logits costs less than to pick tokens: log c and log tau, both [N].

    Each of Newton's steps is a sweep, after which the host looks once whether any row moved.
    """
    log_mass, log_tau, log_c = _uncapped(student, log_p)

    def measured(threshold: Tensor) -> tuple[Tensor, Tensor]:
        count, mass = torch.zeros_like(threshold), torch.zeros_like(threshold)
        for _, z in student.tails():
            kernel(add_capped)(z, student.scale, student.tempered_normalizer, threshold, count, mass)
        return count, mass

    return _newton(measured, log_c, log_tau, log_mass)[0], log_tau


def add_capped(z: Tensor, scale: float, log_normalizer: Tensor, threshold: Tensor, count: Tensor, mass: Tensor) -> None:
    """A pass that adds how many tokens of each row have log q above its threshold [N], and the others' mass."""
    log_q = z.to(mass.dtype) * scale - log_normalizer[:, None]
    above = log_q > threshold[:, None]
    count += above.to(mass.dtype).sum(-1)
    mass += torch.where(above, 0.0, torch.exp(log_q)).sum(-1)


def _uncapped(student: StudentRows, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tail's log-mass, its cap, and log c where no token exceeds it, each [N]."""
    head, log_mass = log_p[:, :-1], log_p[:, -1]
    log_tau = torch.maximum(head.amin(-1), log_mass - math.log(student.blocks.n_vocab - head.shape[1]))
    log_c = (log_mass - (student.log_tail - student.tempered_normalizer)).clamp_max(LARGEST_LOG_RATIO)
    return log_mass, log_tau, log_c


def _newton(measured: Measure, log_c: Tensor, log_tau: Tensor, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Log c of R rows, and the student's mass on the tokens below the cap."""
    tiny, before = torch.finfo(log_c.dtype).tiny, None
    while True:  # c only rises, so that the tokens above the cap only grow more; as many as before are the same ones
        count, mass = measured(log_tau - log_c)
        mass = mass.clamp_min(tiny)
        if before is not None and torch.equal(count, before):
            return log_c, mass
        missing = (log_mass.exp() - count * log_tau.exp()).clamp_min(tiny)
        log_c, before = torch.maximum(log_c, (missing / mass).log().clamp_max(LARGEST_LOG_RATIO)), count


def _measure_known(known: Tokens, rest: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """A `Measure` of R rows of whose tails none but `known` tokens may be above; `rest` [R] is the others' mass."""
    above = known.log_q > threshold[known.rows]
    below = known.sum(torch.where(above, 0.0, known.log_q.exp()), len(rest))
    return known.sum(above.to(rest.dtype), len(rest)), rest + below


def _mass_without(student: StudentRows, rows: Tensor, known: Tokens, tail_mass: Tensor) -> Tensor:
    """The student's mass on the tails of `rows` [R], of `tail_mass` [R], that is not on the `known` tokens."""
    mass = tail_mass - known.sum(known.log_q.exp(), len(rows))
    few = torch.nonzero(mass < CANCELLING * tail_mass)[:, 0]
    if not len(few):
        return mass
    place = torch.full_like(rows, -1).scatter(0, few, torch.arange(len(few), device=rows.device))
    known, chosen = known.of(place[known.rows] >= 0), rows[few]
    blocks = VocabularyBlocks(student.blocks.hidden[chosen], student.blocks.weight, student.blocks.n_vocab)
    cached, left_out = Entries(student.ids[chosen], blocks), Entries(known.ids, blocks, place[known.rows])
    peak, total = blocks.no_mass()
    for part, z in blocks:
        cached.write(part, z, -torch.inf)
        left_out.write(part, z, -torch.inf)
        update_statistics(z, student.scale, peak, total)  # not compiled: the rows are of any number
    mass[few] = (peak + total.log() - student.tempered_normalizer[chosen]).exp()
    return mass


def _tokens_above(student: StudentRows, rows: Tensor, threshold: Tensor, flagged: Tensor) -> Iterator[Tokens]:
    """Tail tokens of `rows` [R] with log q above `threshold` [R]; their `rows` count from 0 to R - 1.

    Args:
        flagged: groups that hold such a token, bool [R, groups].
    """
    _, lengths = torch.unique_consecutive(flagged.sum(-1).cumsum(0) // MOST_PAIRS, return_counts=True)
    for part in torch.arange(len(rows), device=rows.device).split(lengths.tolist()):
        group, row = flagged[part].T.nonzero(as_tuple=True)  # in the order of groups
        yield from _tokens_above_in_groups(student, rows, threshold, group, part[row])


def _tokens_above_in_groups(
    student: StudentRows, rows: Tensor, threshold: Tensor, group: Tensor, row: Tensor
) -> Iterator[Tokens]:
    """The same in pairs of a `group` and a `row`, by products of TILE rows with a group's weights."""
    blocks, n_groups = student.blocks, student.largest.shape[1]
    cached = _cached_in_pairs(student.ids[rows], group, row, n_groups)
    pairs, of_tile = _tiles(group, n_groups)
    for chosen, groups in zip(pairs.split(TILES), of_tile.split(TILES), strict=True):
        columns = groups[:, None] * GROUP + torch.arange(GROUP, device=rows.device)
        at = row[chosen.clamp_min(0)]
        hidden, weight = blocks.hidden[rows[at]], blocks.weight[columns.clamp_max(blocks.n_vocab - 1)]
        z = torch.bmm(hidden, weight.transpose(1, 2)).to(threshold.dtype) * student.scale
        log_q = z - student.tempered_normalizer[rows[at]][..., None]
        real = (chosen >= 0)[..., None] & (columns < blocks.n_vocab)[:, None]
        hit = (log_q > threshold[at][..., None]) & real & ~cached[chosen]
        tile, place, column = hit.nonzero(as_tuple=True)
        yield Tokens(at[tile, place], columns[tile, column], log_q[tile, place, column])


def _cached_in_pairs(ids: Tensor, group: Tensor, row: Tensor, n_groups: int) -> Tensor:
    """Which tokens of each pair of a group and a row are among that row's `ids` [R, k]: bool [pairs, GROUP]."""
    pair_of = torch.full((len(ids), n_groups), -1, dtype=torch.int32, device=ids.device)
    pair_of[row, group] = torch.arange(len(row), dtype=torch.int32, device=ids.device)
    pair = pair_of.gather(1, ids // GROUP)
    inside = pair >= 0
    cached = torch.zeros(len(row), GROUP, dtype=torch.bool, device=ids.device)
    cached[pair[inside].long(), ids[inside] % GROUP] = True
    return cached


def _tiles(group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    """Pairs of one group in rows of TILE, -1 where there are no more, and each tile's group; a multiple of TILES."""
    pairs = torch.bincount(group, minlength=n_groups)
    tiles = (pairs + TILE - 1) // TILE
    place = torch.arange(len(group), device=group.device) - (pairs.cumsum(0) - pairs)[group]
    tile = (tiles.cumsum(0) - tiles)[group] + place // TILE
    n_tiles = -(-int(tiles.sum()) // TILES) * TILES  # the same shapes always: the CPU prepares each product anew
    pair = group.new_full((n_tiles, TILE), -1)
    pair[tile, place % TILE] = torch.arange(len(group), device=group.device)
    of_tile = group.new_zeros(n_tiles)
    of_tile[tile] = group
    return pair, of_tile
