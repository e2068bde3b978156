"""torch.compile of the hot paths changes no result. Needs a C++ compiler, as compiling does."""

import math
import shutil

import pytest
import torch

from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.objective.divergences import Divergence
from microlm.objective.fused_head import Objective, SparseTeacher, fused_head_loss
from microlm.runtime import compilation
from microlm.teacher.recorders import GROUPS, group_maxima, shifted_sum, top_k
from tests.support.dense_tails import lump

pytestmark = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler is here")
N_VOCAB, ROWS, SEQ_LEN = 300, 2, 16


def gradients(compiled: bool, temperature: float, divergence: Divergence, tail: str) -> dict[str, torch.Tensor]:
    """Of every parameter, of a distillation loss on a fixed batch."""
    shape = ModelShape(
        N_VOCAB, 320, layers=2, hidden_size=32, heads=2, head_dim=16, intermediate_size=48, context=16, rope_theta=1e4
    )
    model = StudentLM(shape, seed=1).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    if compiled:
        model.compile_blocks()
    drawn = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, N_VOCAB, (ROWS, SEQ_LEN + 1), generator=drawn)
    log_p = torch.log_softmax(2 * torch.randn(ROWS * SEQ_LEN, N_VOCAB, generator=drawn) / temperature, -1)
    ids = log_p.topk(8).indices
    teacher = SparseTeacher(ids, lump(log_p, ids))
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
    objective = Objective(0.5, 0.5 * temperature**2, divergence, temperature, tail, z_loss=1e-3)
    fused_head_loss(hidden, model.head_weight, tokens[:, 1:].flatten(), N_VOCAB, objective, teacher).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("temperature", "name", "parameter", "tail"),
    [(1.0, "rkl", math.nan, "lumped"), (2.0, "rkl", math.nan, "lumped"), (1.0, "fkl", math.nan, "capped"),
     (2.0, "notebook", 0.7, "capped")],
)  # fmt: skip
def test_compiled_training_step_has_the_eager_gradients(temperature, name, parameter, tail, monkeypatch):
    divergence = Divergence(name, parameter)
    eager = gradients(False, temperature, divergence, tail)
    monkeypatch.setattr(compilation, "enabled", True)
    compiled = gradients(True, temperature, divergence, tail)
    for name, gradient in eager.items():
        torch.testing.assert_close(
            compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_compiled_capture_finds_the_same_tokens_and_tail():
    z = torch.randn(5, 2 * GROUPS, generator=torch.Generator().manual_seed(0)).bfloat16()
    maxima, compiled_sum = (torch.compile(kernel, dynamic=False) for kernel in (group_maxima, shifted_sum))
    assert torch.equal(top_k(z, 9, maxima)[0], top_k(z, 9)[0])
    peak = z.float().amax(-1)
    torch.testing.assert_close(compiled_sum(z, peak, 0.5), shifted_sum(z, peak, 0.5), rtol=1e-5, atol=0)
