"""The fused head against autograd on whole logits, and the divergences' promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.objective import fused_head
from microlm.objective.divergences import DIVERGENCES, forward_kl, lump, reverse_kl, temper
from microlm.objective.fused_head import Objective, SparseTeacher, fused_head_loss, token_nats

N, D, V, PADDED = 7, 5, 700, 704


def problem(
    seed: int, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SparseTeacher]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(N, D).requires_grad_(), normal(PADDED, D).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    teacher_logits = 2 * normal(N, V)
    ids = teacher_logits.topk(k).indices
    return hidden, weight, targets, SparseTeacher(ids, lump(torch.log_softmax(teacher_logits / temperature, -1), ids))


def on_whole_logits(hidden, weight, targets, teacher, objective: Objective) -> torch.Tensor:
    z = hidden @ weight[:V].T
    ce = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    log_q = lump(torch.log_softmax(z / objective.temperature, -1), teacher.ids)
    divergence = DIVERGENCES[objective.divergence](teacher.log_p, log_q).sum()
    loss = (1 - objective.alpha) * ce + objective.alpha * objective.temperature**2 * divergence
    return loss + objective.z_loss * z.logsumexp(-1).square().sum()


@pytest.mark.parametrize("block_elements", [2**11, 2**22])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_fused_loss_and_gradients_equal_autograd_on_whole_logits(divergence, temperature, block_elements, monkeypatch):
    monkeypatch.setattr(fused_head, "BLOCK_ELEMENTS", block_elements)
    objective = Objective(0.6, divergence, temperature, z_loss=1e-2)
    hidden, weight, targets, teacher = problem(0, 6, temperature)
    expected = on_whole_logits(hidden, weight, targets, teacher, objective)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    ours = fused_head_loss(hidden, weight, targets, V, objective, teacher)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-12, atol=0)
    for got, wanted in zip(torch.autograd.grad(ours.loss, (hidden, weight)), gradients):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert (gradients[1][V:] == 0).all()


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_reported_value_is_what_is_differentiated(divergence):
    objective = Objective(0.7, divergence)
    hidden, weight, targets, teacher = problem(1, 9)
    loss = fused_head_loss(hidden, weight, targets, V, objective, teacher)
    gradient = torch.autograd.grad(loss.loss, hidden)[0]
    reported = 0.3 * loss.cross_entropy + 0.7 * loss.divergence
    torch.testing.assert_close(loss.loss.detach(), reported, rtol=1e-12, atol=0)
    direction = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-6

    def value(sign: int) -> float:
        moved = fused_head_loss(
            hidden.detach() + sign * step * direction, weight.detach(), targets, V, objective, teacher
        )
        return float(0.3 * moved.cross_entropy + 0.7 * moved.divergence)

    assert (value(1) - value(-1)) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


def test_alpha_zero_is_cross_entropy_bit_for_bit():
    hidden, weight, targets, teacher = problem(3, 4)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for given_teacher in (None, teacher):
            h, w = hidden.detach().to(dtype).requires_grad_(), weight.detach().float().requires_grad_()
            loss = fused_head_loss(h, w, targets, V, Objective(alpha=0.0), given_teacher, count=3).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_step_in_parts_adds_up_to_the_whole_step():
    hidden, weight, targets, teacher = problem(4, 5)
    objective = Objective(0.5, "fkl")
    whole = torch.autograd.grad(fused_head_loss(hidden, weight, targets, V, objective, teacher, count=N).loss, weight)[
        0
    ]
    parts = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, N)):
        part = SparseTeacher(teacher.ids[rows], teacher.log_p[rows])
        parts += torch.autograd.grad(
            fused_head_loss(hidden[rows], weight, targets[rows], V, objective, part, count=N).loss, weight
        )[0]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def test_token_nats_is_cross_entropy_of_each_token():
    hidden, weight, targets, _ = problem(5, 1)
    expected = torch.nn.functional.cross_entropy(hidden @ weight[:V].T, targets, reduction="none")
    torch.testing.assert_close(token_nats(hidden, weight, targets, V), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(divergence):
    hidden, weight, targets, _ = problem(6, 1)
    log_p = torch.log_softmax((hidden @ weight[:V].T).detach(), -1)
    ids = log_p.topk(8).indices
    loss = fused_head_loss(hidden, weight, targets, V, Objective(1.0, divergence), SparseTeacher(ids, lump(log_p, ids)))
    assert abs(float(loss.divergence)) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss.loss, (hidden, weight)))


def test_all_ids_cached_leaves_no_tail_and_equals_the_dense_divergence():
    hidden, weight, targets, _ = problem(7, 1)
    teacher_log_p = torch.log_softmax(
        torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(8)), -1
    )
    ids = torch.arange(V).repeat(N, 1)
    teacher = SparseTeacher(ids, lump(teacher_log_p, ids))
    for name, divergence in DIVERGENCES.items():
        dense = divergence(teacher_log_p, torch.log_softmax(hidden @ weight[:V].T, -1)).sum()
        sparse = fused_head_loss(hidden, weight, targets, V, Objective(1.0, name), teacher).loss
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=0)
        for got, wanted in zip(
            torch.autograd.grad(sparse, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight))
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-11)


logits = st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@settings(deadline=None)
@given(logits, logits, st.integers(1, 5))
def test_lumped_divergence_is_between_zero_and_the_dense_one(teacher, student, k):
    log_p, log_q = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    previous = 0.0
    for size in range(1, k + 1):
        ids = log_p.topk(size).indices
        for divergence in DIVERGENCES.values():
            lumped = float(divergence(lump(log_p, ids), lump(log_q, ids)))
            assert -1e-9 <= lumped <= float(divergence(log_p, log_q)) + 1e-9
        refined = float(reverse_kl(lump(log_p, ids), lump(log_q, ids)))
        assert refined >= previous - 1e-9  # a finer cache is never looser
        previous = refined


def test_directions_are_the_textbook_ones():
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.6, 0.4]).log()
    assert float(forward_kl(p, q)) == pytest.approx(0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4), rel=1e-5)
    assert float(reverse_kl(p, q)) == pytest.approx(0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1), rel=1e-5)
    assert float(forward_kl(p, q)) == pytest.approx(
        float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")), rel=1e-5
    )


@settings(deadline=None)
@given(logits, st.floats(0.3, 5), st.integers(1, 5))
def test_temper_gives_the_lumped_teacher_at_that_temperature(teacher, temperature, k):
    log_p = torch.log_softmax(teacher, -1)
    ids = log_p.topk(k).indices
    rest = (log_p / temperature).scatter(-1, ids, -torch.inf).logsumexp(-1)
    expected = lump(torch.log_softmax(teacher / temperature, -1), ids)
    torch.testing.assert_close(temper(log_p[ids], rest, temperature), expected, rtol=1e-9, atol=1e-9)
