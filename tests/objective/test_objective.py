"""The fused head against autograd on whole logits, and the divergences' promises."""

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.objective import capped_tail, tails
from microlm.objective.divergences import FORMULAS, LARGEST_LOG_RATIO, Divergence, temper
from microlm.objective.fused_head import Objective, SparseTeacher, fused_head_loss, token_nats
from microlm.objective.vocabulary_blocks import SIZES, VocabularyBlocks, first_sweep
from tests.support.dense_tails import cap_tail, lump, table_tail

N, D, V, PADDED = 7, 5, 700, 704
PARAMETERS = {"jsd": 0.3, "skew_fkl": 0.1, "skew_rkl": 0.1, "notebook": 0.7}
ALL = [Divergence(name, PARAMETERS.get(name, math.nan)) for name in FORMULAS]
BOUNDS = ("lumped", "capped")
TAILS = (*BOUNDS, "table")


def sizes(**changed: int | bool) -> AbstractContextManager[None]:
    """Logits on the CPU held otherwise; with `whole_passes` as on CUDA, few at a time."""
    return patch.dict(SIZES, cpu=replace(SIZES["cpu"], **changed))


def named(divergence: Divergence) -> str:
    return divergence.name


def problem(seed: int, k: int, temperature: float = 1.0, vocabulary: int = V, rows: int = N, spread: float = 2.0):
    """hidden, weight, targets and a sparse teacher, random, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(rows, D).requires_grad_(), normal(vocabulary + PADDED - V, D).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    teacher_logits = spread * normal(rows, vocabulary)
    ids = teacher_logits.topk(k).indices
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    log_table = torch.log_softmax(normal(vocabulary), -1)
    return hidden, weight, targets, SparseTeacher(ids, lump(log_p, ids), log_table)


def dense_divergence(z: torch.Tensor, teacher: SparseTeacher, objective: Objective) -> torch.Tensor:
    log_q = torch.log_softmax(z / objective.temperature, -1)
    if objective.tail == "lumped":
        return objective.divergence(teacher.log_p, lump(log_q, teacher.ids)).sum()
    if objective.tail == "table":
        return objective.divergence(table_tail(teacher.log_p, teacher.ids, teacher.log_table), log_q).sum()
    nearest = cap_tail(teacher.log_p, teacher.ids, log_q.detach())
    return objective.divergence(nearest, log_q).sum()


def on_whole_logits(hidden, weight, targets, teacher, objective: Objective) -> torch.Tensor:
    z = hidden @ weight[: weight.shape[0] - (PADDED - V)].T
    ce = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    loss = objective.ce_weight * ce + objective.kd_weight * dense_divergence(z, teacher, objective)
    return loss + objective.z_loss * z.logsumexp(-1).square().sum()


def assert_equal_to_autograd(hidden, weight, targets, teacher, objective: Objective, tolerance: float) -> None:
    vocabulary = weight.shape[0] - (PADDED - V)
    count = len(targets)
    expected = on_whole_logits(hidden.double(), weight.double(), targets, teacher, objective) / count
    wanted = torch.autograd.grad(expected, (hidden, weight))
    ours = fused_head_loss(hidden, weight, targets, vocabulary, objective, teacher, count)
    got = torch.autograd.grad(ours.loss, (hidden, weight))
    assert float((ours.loss - expected).detach().abs()) <= tolerance * max(1.0, float(expected.detach().abs()))
    for a, b in zip(got, wanted):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))
    assert (got[1][vocabulary:] == 0).all()  # padding rows get no gradient


@pytest.mark.parametrize("whole_passes", [False, True])
@pytest.mark.parametrize("block", [2**11, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ALL, ids=named)
def test_fused_loss_and_gradients_equal_autograd_on_whole_logits(divergence, tail, temperature, block, whole_passes):
    objective = Objective(0.4, 0.6 * temperature**2, divergence, temperature, tail, z_loss=1e-2)
    with sizes(block=block, whole_passes=whole_passes):
        assert_equal_to_autograd(*problem(0, 6, temperature), objective, tolerance=1e-11)


@settings(deadline=None, max_examples=60)
@given(
    divergence=st.sampled_from(ALL),
    tail=st.sampled_from(TAILS),
    temperature=st.sampled_from([1.0, 2.5]),
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 9), st.integers(20, 900), st.integers(1, 20)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    whole_passes=st.booleans(),
)
def test_logits_kept_between_the_sweeps_change_no_bit(divergence, tail, temperature, seed, shape, dtype, whole_passes):
    rows, vocabulary, k = shape
    hidden, weight, targets, teacher = problem(seed, k, temperature, vocabulary, rows)
    hidden, weight = hidden.to(dtype), weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    objective = Objective(0.4, 0.6, divergence, temperature, tail, z_loss=1e-2)

    def found(kept_elements: int) -> list[torch.Tensor]:
        given_ = [t.detach().requires_grad_() for t in (hidden, weight)]
        with sizes(kept=kept_elements, block=2**11 if whole_passes else 2**22, whole_passes=whole_passes):
            loss = fused_head_loss(*given_, targets, vocabulary, objective, teacher).loss
        return [loss.detach(), *torch.autograd.grad(loss, given_)]

    for kept, anew in zip(found(rows * vocabulary), found(rows * vocabulary - 1), strict=True):
        assert torch.equal(kept, anew)


@settings(deadline=None, max_examples=80)
@given(
    divergence=st.sampled_from(ALL),
    tail=st.sampled_from(TAILS),
    temperature=st.floats(0.5, 4),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 9), st.integers(20, 900), st.integers(1, 20)),
    spread=st.floats(0.05, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    block=st.sampled_from([2**8, 2**11, 2**22]),
    whole_passes=st.booleans(),
)
def test_fused_head_equals_autograd_whatever_the_shape(
    divergence, tail, temperature, alpha, seed, shape, spread, dtype, block, whole_passes
):
    rows, vocabulary, k = shape
    hidden, weight, targets, teacher = problem(seed, k, temperature, vocabulary, rows, spread)
    weight = weight * 0.2  # as a trained head's rows, so that float32's own rounding of a product stays below 1e-6
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    objective = Objective(1 - alpha, alpha * temperature**2, divergence, temperature, tail)
    # float32 is held against float64 on the same numbers, relative to the size of what is compared
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6 * max(1.0, temperature**2)
    if divergence.name == "tvd":  # its slope jumps where p = q, and rounding decides on which side a token falls
        tolerance = max(tolerance, 1e-5)
    with sizes(block=block, whole_passes=whole_passes):
        assert_equal_to_autograd(hidden, weight, targets, teacher, objective, tolerance)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ALL, ids=named)
def test_reported_value_is_what_is_differentiated(divergence, tail):
    """For a capped tail too: its p* moves with the student, and by Danskin's theorem that adds nothing to the slope."""
    objective = Objective(0.3, 0.7, divergence, tail=tail)
    hidden, weight, targets, teacher = problem(1, 9)
    loss = fused_head_loss(hidden, weight, targets, V, objective, teacher)
    gradient = torch.autograd.grad(loss.loss, hidden)[0]
    reported = 0.3 * loss.cross_entropy + 0.7 * loss.divergence
    torch.testing.assert_close(loss.loss.detach(), reported, rtol=1e-12, atol=0)
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-6

    def value(sign: int) -> float:
        moved = (hidden + sign * step * direction).detach()
        at = fused_head_loss(moved, weight.detach(), targets, V, objective, teacher)
        return float(0.3 * at.cross_entropy + 0.7 * at.divergence)

    assert (value(1) - value(-1)) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    vocabulary=st.integers(70, 1500),
    k=st.integers(1, 66),
    temperature=st.sampled_from([1.0, 2.5]),
    sharpness=st.floats(0.1, 40),
    tile=st.integers(1, 40),
    most_pairs=st.sampled_from([1, 7, 2**17]),
)
def test_water_filling_is_that_of_the_sorted_vocabulary(
    seed, rows, vocabulary, k, temperature, sharpness, tile, most_pairs
):
    """Students sharp enough that c rises through many rounds, pieces and tiles of any size."""
    hidden, weight, targets, teacher = problem(seed, k, temperature, vocabulary, rows, 0.5)
    blocks = VocabularyBlocks(hidden.detach() * sharpness, weight.detach(), vocabulary)
    z = blocks.hidden @ blocks.weight.T / temperature
    log_q = torch.log_softmax(z, -1)
    with patch.multiple(capped_tail, TILE=tile, TILES=3, MOST_PAIRS=most_pairs, MOST_PICKED=1):
        student = first_sweep(blocks, targets, teacher.ids, 1 / temperature, groups=True)
        found = capped_tail.solve(student, teacher.log_p)
    oracle = cap_tail(teacher.log_p, teacher.ids, log_q)
    made = torch.minimum(found.log_tau[:, None], found.log_c[:, None] + log_q)
    made = made.scatter(-1, teacher.ids, teacher.log_p[:, :-1])
    held = found.log_c < LARGEST_LOG_RATIO  # where it is limited, so that float32 can hold it, p* sums to less than 1
    torch.testing.assert_close(made[held].exp(), oracle[held].exp(), rtol=1e-9, atol=1e-14)
    with sizes(block=2**10, whole_passes=True):
        swept = VocabularyBlocks(blocks.hidden, blocks.weight, vocabulary)
        student = first_sweep(swept, targets, teacher.ids, 1 / temperature)
        found_by_sweeps = capped_tail.solve_by_sweeps(student, teacher.log_p)
    torch.testing.assert_close(found_by_sweeps, (found.log_c, found.log_tau), rtol=1e-9, atol=1e-9)
    capped = torch.zeros_like(z, dtype=torch.bool)
    assert len(found.capped.ids) == len({*zip(found.capped.rows.tolist(), found.capped.ids.tolist())})
    capped[found.capped.rows, found.capped.ids] = True
    outside = torch.ones_like(capped).scatter(-1, teacher.ids, False)
    clearly = (found.log_c[:, None] + log_q - found.log_tau[:, None]).abs() > 1e-6
    assert torch.equal(capped & clearly, outside & clearly & (found.log_c[:, None] + log_q > found.log_tau[:, None]))


@pytest.mark.parametrize("divergence", ALL, ids=named)
def test_a_flat_tail_under_a_sure_teacher_is_swept_and_gives_what_picking_gives(divergence):
    hidden, weight, targets, _ = problem(7, 8, vocabulary=1500, rows=24)
    logits = torch.randn(24, 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) / 2
    log_p = logits.scatter(-1, targets[:, None], 60).log_softmax(-1)
    ids = log_p.topk(8).indices
    teacher, objective = SparseTeacher(ids, lump(log_p, ids)), Objective(0.5, 0.5, divergence, 1.0, "capped")
    found = []
    for most_picked, sweeps in ((capped_tail.MOST_PICKED, 1), (1, 0)):
        h, w = (of.detach().requires_grad_() for of in (hidden, weight))
        solved = patch.object(tails, "solve_by_sweeps", wraps=capped_tail.solve_by_sweeps)
        with patch.object(capped_tail, "MOST_PICKED", most_picked), solved as by_sweeps:
            loss = fused_head_loss(h, w, targets, 1500, objective, teacher).loss
        assert by_sweeps.call_count == sweeps
        found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    for swept, picked in zip(*found, strict=True):
        torch.testing.assert_close(swept, picked, rtol=1e-9, atol=1e-12)


def test_without_a_distillation_term_it_is_cross_entropy_bit_for_bit():
    hidden, weight, targets, teacher = problem(3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for given_teacher in (None, teacher):
            h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().float().requires_grad_()
            loss = fused_head_loss(h, w, targets, V, Objective(1.0, 0.0), given_teacher, count=3).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("tail", TAILS)
def test_a_step_in_parts_adds_up_to_the_whole_step(tail):
    hidden, weight, targets, teacher = problem(4, 5)
    objective = Objective(0.5, 0.5, Divergence("fkl"), tail=tail)

    def gradient(rows: slice) -> torch.Tensor:
        part = SparseTeacher(teacher.ids[rows], teacher.log_p[rows], teacher.log_table)
        loss = fused_head_loss(hidden[rows], weight, targets[rows], V, objective, part, count=N).loss
        return torch.autograd.grad(loss, weight)[0]

    whole = gradient(slice(0, N))
    torch.testing.assert_close(gradient(slice(0, 3)) + gradient(slice(3, N)), whole, rtol=1e-11, atol=1e-14)


def test_token_nats_is_cross_entropy_of_each_token():
    hidden, weight, targets, _ = problem(5, 1)
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:V].T, targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, weight, targets, V), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", BOUNDS)
@pytest.mark.parametrize("divergence", ALL, ids=named)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence, tail):
    hidden, weight, targets, _ = problem(6, 1)
    log_p = torch.log_softmax((hidden @ weight[:V].T).detach(), -1)
    ids = log_p.topk(8).indices
    objective = Objective(0.0, 1.0, divergence, tail=tail)
    if divergence.name == "tvd":  # not differentiable there: any slope between -1/2 and 1/2 is one
        loss = fused_head_loss(hidden, weight, targets, V, objective, SparseTeacher(ids, lump(log_p, ids)))
        assert abs(float(loss.divergence.detach())) < 1e-12
        return
    loss = fused_head_loss(hidden, weight, targets, V, objective, SparseTeacher(ids, lump(log_p, ids)))
    assert abs(float(loss.divergence.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss.loss, (hidden, weight)))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("divergence", ALL, ids=named)
def test_all_ids_cached_leaves_no_tail_and_equals_the_dense_divergence(divergence, tail):
    hidden, weight, targets, _ = problem(7, 1)
    teacher_log_p = torch.log_softmax(
        torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(8)), -1
    )
    ids = torch.arange(V).repeat(N, 1)
    teacher = SparseTeacher(ids, lump(teacher_log_p, ids), torch.zeros(V, dtype=torch.float64))
    dense = divergence(teacher_log_p, torch.log_softmax(hidden @ weight[:V].T, -1)).sum()
    sparse = fused_head_loss(hidden, weight, targets, V, Objective(0.0, 1.0, divergence, tail=tail), teacher).loss
    torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=0)
    for got, wanted in zip(torch.autograd.grad(sparse, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight))):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(divergence=st.sampled_from(ALL), tail=st.sampled_from(TAILS), seed=st.integers(0, 2**31))
def test_the_order_of_the_cached_ids_does_not_matter(divergence, tail, seed):
    hidden, weight, targets, teacher = problem(seed, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    log_p = torch.cat((teacher.log_p[:, order], teacher.log_p[:, -1:]), -1)
    shuffled = SparseTeacher(teacher.ids[:, order], log_p, teacher.log_table)
    objective = Objective(0.5, 0.5, divergence, tail=tail)
    results = []
    for given_teacher in (teacher, shuffled):
        loss = fused_head_loss(hidden, weight, targets, V, objective, given_teacher).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


logits = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@settings(deadline=None)
@given(logits, logits, st.integers(1, 5), st.sampled_from(ALL))
def test_lumped_is_below_capped_is_below_dense_and_a_larger_cache_is_never_looser(teacher, student, k, divergence):
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    dense, previous = float(divergence(log_p, log_q)), 0.0
    slack = 1e-9 * max(1.0, abs(dense))
    for size in range(1, k + 1):
        ids = log_p.topk(size).indices
        coarse = lump(log_p, ids)
        lumped = float(divergence(coarse, lump(log_q, ids)))
        capped = float(divergence(cap_tail(coarse, ids, log_q), log_q))
        assert -1e-9 <= lumped <= capped + slack <= dense + 2 * slack
        assert lumped >= previous - slack
        previous = lumped


@settings(deadline=None)
@given(logits, logits, st.integers(1, 5))
def test_the_capped_teacher_agrees_with_the_cache(teacher, student, k):
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    ids = log_p.topk(k).indices
    nearest = cap_tail(lump(log_p, ids), ids, log_q)
    assert float(nearest.exp().sum()) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(nearest[ids], log_p[ids])
    assert float(nearest.max()) <= float(log_p.max()) + 1e-9
    tail = torch.ones(6, dtype=torch.bool)
    tail[ids] = False
    assert float(nearest[tail].max()) <= float(log_p[ids].min()) + 1e-9


@settings(deadline=None)
@given(logits, st.integers(1, 5))
def test_a_table_with_the_teachers_own_tail_makes_the_cache_dense(teacher, k):
    log_p = torch.log_softmax(teacher / 4, -1)  # the tail's share of the table is a difference: not too small
    ids = log_p.topk(k).indices
    torch.testing.assert_close(table_tail(lump(log_p, ids), ids, log_p), log_p, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(logits, logits, st.sampled_from(ALL))
def test_slope_is_the_derivative_of_the_term(teacher, student, divergence):
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1).requires_grad_()
    by_log_q = torch.autograd.grad(divergence.term(log_p, log_q).sum(), log_q)[0]
    expected = log_q.detach().exp() * divergence.slope(log_p - log_q.detach())
    torch.testing.assert_close(by_log_q, expected, rtol=1e-6, atol=1e-9)


def test_directions_are_the_textbook_ones():
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.6, 0.4]).log()
    forward, reverse = Divergence("fkl")(p, q), Divergence("rkl")(p, q)
    assert float(forward) == pytest.approx(0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4), rel=1e-5)
    assert float(reverse) == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), rel=1e-5)
    assert float(forward) == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")), rel=1e-5
    )


def test_notebook_is_the_published_line_gradient_through_the_target_included():
    generator = torch.Generator().manual_seed(9)
    teacher, student = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    a, temperature = 0.7, 2.5
    q, p = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    target = a * p + (1 - a) * q
    published = torch.nn.functional.kl_div(q.log(), target, reduction="sum")
    wanted = torch.autograd.grad(published, student)[0]
    ours = Divergence("notebook", a)(p.log(), torch.log_softmax(student / temperature, -1)).sum()
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, student)[0], wanted, rtol=1e-8, atol=1e-12)


def test_limits_of_the_families():
    p, q = (torch.log_softmax(torch.randn(30, generator=torch.Generator().manual_seed(s)).double(), -1) for s in (1, 2))
    forward, reverse = float(Divergence("fkl")(p, q)), float(Divergence("rkl")(p, q))
    assert float(Divergence("jsd", 1e-6)(p, q)) / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert float(Divergence("jsd", 1 - 1e-6)(p, q)) / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert float(Divergence("skew_fkl", 1e-9)(p, q)) == pytest.approx(forward, rel=1e-6)
    assert float(Divergence("skew_rkl", 1e-9)(p, q)) == pytest.approx(reverse, rel=1e-6)
    assert float(Divergence("notebook", 1 - 1e-9)(p, q)) == pytest.approx(forward, rel=1e-6)
    apart = torch.tensor([0.0, -60.0]).double(), torch.tensor([-60.0, 0.0]).double()
    assert float(Divergence("skew_rkl", 0.1)(*apart)) == pytest.approx(math.log(10), rel=1e-6)  # bounded, as rkl is not
    assert float(Divergence("tvd")(*apart)) == pytest.approx(1, rel=1e-6)


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="minillm is none of fkl"):
        Divergence("minillm")


@settings(deadline=None)
@given(logits, st.floats(0.3, 5), st.integers(1, 5))
def test_temper_gives_the_lumped_teacher_at_that_temperature(teacher, temperature, k):
    log_p = torch.log_softmax(teacher, -1)
    ids = log_p.topk(k).indices
    rest = (log_p / temperature).scatter(-1, ids, -torch.inf).logsumexp(-1)
    expected = lump(torch.log_softmax(teacher / temperature, -1), ids)
    torch.testing.assert_close(temper(log_p[ids], rest, temperature), expected, rtol=1e-9, atol=1e-9)
