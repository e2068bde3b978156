"""On the card: attention runs the kernel that it should, as the profiler saw it, and nowhere the slow one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from microlm.corpus.batches import read_batch
from microlm.evaluation.scoring.engine import score
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.objective.fused_head import Objective, fused_head_loss
from microlm.teacher.recorders import Recorder
from tests.cuda.test_cuda_models import N_VOCAB, SEQ_LEN, asked, identity_of, llama, moved, olmo, shards  # noqa: F401
from tests.support.on_cuda import DEVICE, device  # noqa: F401

pytestmark = pytest.mark.cuda
SHAPE = ModelShape(
    N_VOCAB, 1024, layers=2, hidden_size=256, heads=2, head_dim=128, intermediate_size=256, context=256, rope_theta=1e4
)
SLOW = "_scaled_dot_product_attention_math"  # of PyTorch's operators; makes the whole [T, T] matrix


def seen(run: Callable[[], object]) -> set[str]:
    """Names of all operators and kernels of `run`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return {event.name for event in profiler.events()}


def assert_flash(names: set[str]) -> None:
    """On CUDA a kernel's own name has to say so; on the CPU the operator's."""
    attention = sorted(name for name in names if "attention" in name or "flash" in name.lower() or "fmha" in name)
    assert not any(SLOW in name for name in names), attention
    kernels = [name for name in names if "flash" in name.lower() and not name.startswith("aten::")]
    assert kernels if DEVICE.type == "cuda" else "aten::_scaled_dot_product_flash_attention_for_cpu" in names, attention


def test_a_training_step_runs_flash_attention_forward_and_backward(device):  # noqa: F811
    model = StudentLM(SHAPE).set_activation_dtype(torch.bfloat16).to(device).train()
    rows = torch.randint(0, N_VOCAB, (2, 129), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        hidden = model.hidden(rows[:, :-1]).flatten(0, 1)
        fused_head_loss(
            hidden, model.head_weight, rows[:, 1:].flatten(), N_VOCAB, Objective(), count=256
        ).loss.backward()

    step()
    names = seen(step)
    assert_flash(names)
    backward = [
        name for name in names if "flash" in name.lower() and ("backward" in name.lower() or "bwd" in name.lower())
    ]
    assert backward, sorted(name for name in names if "flash" in name.lower())


@pytest.mark.parametrize("teacher", [llama, olmo])
def test_the_teachers_pass_runs_flash_attention(teacher, shards, device):  # noqa: F811
    model = moved(teacher(), torch.bfloat16, device)
    record, batch = Recorder(model, identity_of(shards), compiled=False), read_batch(shards, np.arange(2), SEQ_LEN)
    record.labels(batch)
    assert_flash(seen(lambda: record.labels(batch)))


@pytest.mark.parametrize("backend", ["tree", "cached"])
def test_scoring_under_a_mask_never_falls_back_to_the_slow_kernel(backend, device):  # noqa: F811
    model = StudentLM(SHAPE).set_activation_dtype(torch.bfloat16).to(device).eval()
    names = seen(lambda: score(model, asked(1), 512, backend=backend))
    attention = sorted(name for name in names if "attention" in name)
    assert attention
    assert not any(SLOW in name for name in names), attention


def test_the_slow_kernel_would_be_seen(device):  # noqa: F811
    """As the other tests look for it, where it is asked for."""
    q = torch.randn(1, 2, 64, 64, device=device)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        names = seen(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert any(SLOW in name for name in names), sorted(names)
