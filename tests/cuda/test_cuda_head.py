"""On the card: every objective, tail, temperature and dtype of the fused head against dense autograd in float64."""

import itertools

import pytest
import torch

from microlm.objective.divergences import Divergence
from microlm.objective.fused_head import Objective, SparseTeacher, fused_head_loss, token_nats
from tests.objective.test_objective import ALL, PADDED, TAILS, V, on_whole_logits, problem
from tests.support.on_cuda import COMPILES, DEVICE, cases, compiled_kernels, device, sample, sizes_of_cuda  # noqa: F401

pytestmark = pytest.mark.cuda
# sizes that are no multiple of anything. On a CPU with AMX the bfloat16 product of a matrix with columns beside it, as
# CUDA's layout has them, reads into these where the length is no multiple of 32 (oneDNN in PyTorch 2.13)
VOCABULARY = 2000 if DEVICE.type == "cuda" else 2048
ROWS, CACHED = 97, 9
# of the loss and, relative to their norms, of the gradients; bfloat16 logits are a 256th apart, and so are exponentials
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-10}
JUMPING = {torch.bfloat16: 0.2, torch.float32: 2e-3, torch.float64: 1e-10}  # tvd's slope jumps where p = q
LAYOUTS = {"one block": {}, "many blocks": {"block": 2**15}, "made twice": {"block": 2**15, "kept": 0}}
EVERYTHING = {"divergence": ALL, "tail": TAILS, "temperature": (1.0, 2.5), "dtype": TOLERANCES, "layout": LAYOUTS}


def on(device: torch.device, dtype: torch.dtype, temperature: float = 1.0, rows: int = ROWS):  # noqa: F811
    """`problem`, on the device, in numbers that `dtype` holds exactly; the weight is never narrower than float32."""
    hidden, weight, targets, teacher = problem(0, CACHED, temperature, VOCABULARY, rows, 1.0)
    narrow = (tensor.detach().to(dtype) for tensor in (hidden, 0.5 * weight))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight = (tensor.to(device) for tensor in narrow)
    said = SparseTeacher(teacher.ids.to(device), teacher.log_p.to(device), teacher.log_table.to(device))
    return hidden.requires_grad_(), weight.to(wide).requires_grad_(), targets.to(device), said


def _dense(hidden, weight, targets, teacher, objective: Objective) -> torch.Tensor:
    if teacher is not None:
        return on_whole_logits(hidden, weight, targets, teacher, objective)
    z = hidden @ weight[:VOCABULARY].T
    nats = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
    return nats + objective.z_loss * z.logsumexp(-1).square().sum()


def assert_as_dense(hidden, weight, targets, teacher, objective: Objective, tolerance: float) -> None:
    """Loss and gradients of the fused head against those of whole logits in float64."""
    count = len(targets)
    dense = _dense(hidden.double(), weight.double(), targets, teacher, objective) / count
    wanted = torch.autograd.grad(dense, (hidden, weight))
    fused = fused_head_loss(hidden, weight, targets, VOCABULARY, objective, teacher, count)
    found = torch.autograd.grad(fused.loss, (hidden, weight))
    assert float((fused.loss - dense).detach().abs()) <= tolerance * max(1.0, float(dense.detach().abs()))
    for ours, theirs in zip(found, wanted):
        assert ours.dtype == theirs.dtype
        apart = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        assert apart <= tolerance, apart
    assert (found[1][VOCABULARY:] == 0).all()


def named(value: object) -> str:
    return getattr(value, "name", str(value))


@pytest.mark.parametrize(tuple(EVERYTHING), cases(*EVERYTHING.values()), ids=named)
def test_fused_head_is_dense_autograd(divergence, tail, temperature, dtype, layout, device):  # noqa: F811
    objective = Objective(0.4, 0.6 * temperature**2, divergence, temperature, tail, z_loss=1e-2)
    tolerance = (JUMPING if divergence.name == "tvd" else TOLERANCES)[dtype]
    with sizes_of_cuda(**LAYOUTS[layout]):
        assert_as_dense(*on(device, dtype, temperature), objective, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_cross_entropy_alone_and_its_nats(rows, dtype, device):  # noqa: F811
    hidden, weight, targets, _ = on(device, dtype, rows=rows)
    with sizes_of_cuda(block=2**15):
        assert_as_dense(hidden, weight, targets, None, Objective(z_loss=1e-3), TOLERANCES[dtype])
        nats = token_nats(hidden, weight, targets, VOCABULARY)
    dense = hidden.detach().double() @ weight.detach().double()[:VOCABULARY].T
    wanted = torch.nn.functional.cross_entropy(dense, targets, reduction="none")
    assert float((nats.double() - wanted).abs().max()) <= TOLERANCES[dtype] * max(1.0, float(wanted.max()))


@pytest.mark.parametrize("tail", TAILS)
def test_rows_that_the_teacher_does_not_cover_have_cross_entropy_alone(tail, device):  # noqa: F811
    hidden, weight, targets, teacher = on(device, torch.float32)
    covered = torch.arange(ROWS, device=device) % 3 != 0
    said = SparseTeacher(teacher.ids, teacher.log_p, teacher.log_table, covered)
    objective = Objective(0.5, 0.5, Divergence("fkl"), tail=tail)
    fused = fused_head_loss(hidden, weight, targets, VOCABULARY, objective, said, ROWS)
    found = torch.autograd.grad(fused.loss, hidden)[0]
    wide = hidden.double(), weight.double()
    rows = covered.nonzero()[:, 0]
    dense = _dense(wide[0][rows], wide[1], targets[rows], teacher.of(rows), objective)
    dense = dense + _dense(wide[0][~covered], wide[1], targets[~covered], None, Objective())
    wanted = torch.autograd.grad(dense / ROWS, hidden)[0]
    assert float((found - wanted).norm() / wanted.norm()) <= TOLERANCES[torch.float32]


@COMPILES
@pytest.mark.parametrize(("name", "tail"), [("rkl", "lumped"), ("fkl", "capped"), ("jsd", "table")])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_compiled_passes_are_dense_autograd_too(name, tail, temperature, device):  # noqa: F811
    divergence = next(one for one in ALL if one.name == name)
    objective = Objective(0.4, 0.6 * temperature**2, divergence, temperature, tail, z_loss=1e-2)
    with sizes_of_cuda(block=2**15), compiled_kernels():
        assert_as_dense(*on(device, torch.bfloat16, temperature), objective, TOLERANCES[torch.bfloat16])


def test_logits_that_are_kept_change_no_bit(device):  # noqa: F811
    hidden, weight, targets, teacher = on(device, torch.bfloat16)
    objective, results = Objective(0.5, 0.5, Divergence("rkl")), []
    for layout in ("many blocks", "made twice"):
        with sizes_of_cuda(**LAYOUTS[layout]):
            loss = fused_head_loss(hidden, weight, targets, VOCABULARY, objective, teacher, ROWS).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(kept, anew) for kept, anew in zip(*results))


def test_in_the_sample_on_a_cpu_any_two_values_of_two_parameters_meet():
    sampled = sample(*EVERYTHING.values())
    for one, other in itertools.combinations(range(len(EVERYTHING)), 2):
        wanted = itertools.product(*(list(EVERYTHING.values())[place] for place in (one, other)))
        assert {(case[one], case[other]) for case in sampled} == set(wanted)


def test_the_problem_has_rows_of_padding():
    assert PADDED > V
