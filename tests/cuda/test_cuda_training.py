"""On the card: resume to the bit, one rank over nccl, nothing compiled after the warm-up, no wait that has no name."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.gpu.device import compilations
from microlm.corpus.batches import Batches, evenly_spaced
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.objective.fused_head import HeadLoss
from microlm.parameters import PretrainConfig
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.recorders import LiveTeacher, Recorder
from microlm.training import loop
from microlm.training.loop import Feed, Interrupted, Loss, Plan, Replica, take_step, train
from microlm.training.losses import Distillation
from microlm.training.optimizer import Optimizers
from tests.cuda.test_cuda_models import asked, llama
from tests.support.clones import ROOT
from tests.support.on_cuda import COMPILES, DEVICE, NEEDS_CUDA, compiled_kernels, device  # noqa: F401
from tests.support.toy import toy_shards
from tests.training import test_training as on_cpu
from tests.training.test_training import BATCH, CROSS_ENTROPY, N_VOCAB, SETTINGS, STEPS, look, reverse_kl, same_bits

pytestmark = pytest.mark.cuda
HERE = str(ROOT / "microlm")
# where the host waits for the device in a step: take_step needs the loss and the norm before it may update, a live
# teacher's labels are refused where they are not finite
WAITS = {"take_step"}
LIVE_WAITS = {"refuse_not_finite"}
TAIL_WAITS = {"capped": {"solve_by_sweeps"}}  # after each of Newton's sweeps, whether any row moved


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=900)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """What is compared to the bit must not depend on the order in which threads add."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)


def batches_of(shards: TokenShards) -> Batches:
    return Batches(shards, BATCH, seed=1, windows=evenly_spaced(50, 30))


def on_card(device: torch.device, dtype: torch.dtype = torch.float32) -> StudentLM:  # noqa: F811
    return on_cpu.student().set_activation_dtype(dtype).to(device)


def trained(
    shards: TokenShards,
    directory: Path,
    device: torch.device,  # noqa: F811
    loss: Loss = CROSS_ENTROPY,
    settings: PretrainConfig = SETTINGS,
    moments: dict[str, torch.Tensor] | None = None,
) -> tuple[StudentLM, list[str], Optimizers]:
    model = on_card(device, torch.bfloat16)
    optimizers = Optimizers(model, settings)
    if moments:
        optimizers.load_state_tensors(moments)
    plan = Plan("toy", STEPS, 100, settings)
    history = train(model, batches_of(shards), loss, plan, optimizers, look, directory)
    return model, history.log, optimizers


def stopping_at(call: int) -> Loss:
    """Cross-entropy that asks its process to stop at the `call`-th time."""
    calls = []

    def loss(*arguments: object) -> HeadLoss:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return CROSS_ENTROPY(*arguments)

    return loss


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_stopped_and_resumed_training_is_one_that_was_not(optimizer, shards, device, deterministic, tmp_path):  # noqa: F811
    settings = replace(SETTINGS, optimizer=optimizer)
    whole, log, _ = trained(shards, tmp_path / "whole", device, settings=settings)
    for call in (9, 15):  # two rehearsals of two parts go before; the second time the state is of a resumed one
        with pytest.raises(Interrupted):
            trained(shards, tmp_path / "stopped", device, stopping_at(call), settings)
    resumed, resumed_log, _ = trained(shards, tmp_path / "stopped", device, settings=settings)
    assert same_bits(resumed, whole)
    assert resumed_log == log


def test_moments_that_are_kept_go_on_on_the_device(shards, device, tmp_path):  # noqa: F811
    """As `continuation.optimizer_state: keep` has them: read from a file, so on the CPU."""
    _, _, optimizers = trained(shards, tmp_path / "control", device)
    moments = {name: tensor.cpu() for name, tensor in optimizers.state_tensors().items()}
    with_moments, _, _ = trained(shards, tmp_path / "kept", device, moments=moments)
    without, _, _ = trained(shards, tmp_path / "reset", device)
    assert all(parameter.isfinite().all() for parameter in with_moments.parameters())
    assert not same_bits(with_moments, without)


@contextmanager
def one_rank(path: Path) -> Iterator[None]:
    """A process group of this process alone, over what its device has."""
    backend, where = ("nccl", DEVICE) if DEVICE.type == "cuda" else ("gloo", None)
    if where is not None:
        where = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(backend, init_method=f"file://{path}", rank=0, world_size=1, device_id=where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_one_rank_sums_gradients_and_sends_matrices_unchanged(device, deterministic, tmp_path):  # noqa: F811
    """Over nccl on the card: what DistributedDataParallel and Muon's exchange do, of one process."""
    tokens = torch.randint(0, N_VOCAB, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)

    def gradients(model: StudentLM, hidden: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        model.logits(hidden(tokens)).logsumexp(-1).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    alone = on_card(device)
    expected = gradients(alone, alone.hidden)
    with one_rank(tmp_path / "store"):
        shared = on_card(device)
        parallel = DistributedDataParallel(shared, gradient_as_bucket_view=True, **loop.WITHOUT_BUFFERS)
        parallel.register_comm_hook(None, loop._sum_gradients)
        found = gradients(shared, parallel)
        sent = [parameter.detach().clone() for parameter in shared.parameters()]
        for tensor in sent:
            dist.broadcast(tensor, 0, async_op=True).wait()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(sent, shared.parameters()))


def steps_of(
    shards: TokenShards,
    device: torch.device,  # noqa: F811
    loss: Loss,
    compiled: bool = False,
    settings: PretrainConfig = SETTINGS,
) -> tuple[StudentLM, Callable[[int], float]]:
    """A model and what takes its next step."""
    model = on_card(device, torch.bfloat16)
    if compiled:
        model.compile_blocks()
    batches, plan = batches_of(shards), Plan("toy", STEPS, 0, settings)
    replica, optimizers = Replica(model), Optimizers(model, settings)
    feed = Feed(batches, loss, lambda step: step / STEPS, device)
    return model, lambda step: take_step(replica, feed, plan, optimizers, step)


@COMPILES
def test_nothing_is_compiled_after_the_warm_up(shards, device):  # noqa: F811
    """Two steps, then evaluations of two kinds, and all of these again."""
    loss = Distillation(N_VOCAB, reverse_kl(0.5), live(toy_like(shards), device))
    with compiled_kernels():
        model, step = steps_of(shards, device, loss, compiled=True)

        def look_and_go_on(first: int) -> None:
            for number in range(first, first + 2):
                step(number)
            loss_on(model, shards, np.ones(N_VOCAB, np.int32), BATCH.seq_len, 6, 2)
            questions = [replace(one, context=one.context % N_VOCAB, endings=tuple(e % N_VOCAB for e in one.endings))
                         for one in asked(3)]  # fmt: skip
            score(model, [one for one in questions if len(one.context) < 8], 64)

        look_and_go_on(0)
        before = compilations()
        assert before > 0
        look_and_go_on(2)
        look_and_go_on(4)
        assert compilations() == before


def toy_like(shards: TokenShards) -> CacheIdentity:
    return CacheIdentity("toy", None, "toy", N_VOCAB, shards.digest, BATCH.seq_len, 50, 5, (1.0,))


def live(identity: CacheIdentity, device: torch.device) -> LiveTeacher:  # noqa: F811
    model = llama()
    model.n_vocab = identity.n_vocab
    tables = torch.full((1, identity.n_vocab), -4.0)
    return LiveTeacher(Recorder(model.to(device, torch.bfloat16), identity, compiled=False), tables)


@contextmanager
def waits(found: set[str]) -> Iterator[None]:
    """Into `found`, the functions of the project in which the host waited for the device."""

    def tell(message: object, *_: object) -> None:
        if "called a synchronizing" in str(message):
            ours = [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(HERE)]
            found.add(ours[-1] if ours else f"outside of the project: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = tell
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def test_a_cross_entropy_step_waits_where_it_says(shards, device):  # noqa: F811
    assert_waits(steps_of(shards, device, CROSS_ENTROPY)[1], WAITS)


@pytest.mark.parametrize("tail", ["lumped", "capped", "table"])
def test_a_distillation_step_waits_where_it_says(tail, shards, device):  # noqa: F811
    asked_for = replace(reverse_kl(0.5), tail=tail)
    loss = Distillation(N_VOCAB, asked_for, live(toy_like(shards), device))
    assert_waits(steps_of(shards, device, loss)[1], WAITS | LIVE_WAITS | TAIL_WAITS.get(tail, set()))


def assert_waits(step: Callable[[int], float], expected: set[str]) -> None:
    """None but the expected ones, and these, so that it is known to see them."""
    for number in range(2):  # the first step makes the optimizers' state
        step(number)
    found: set[str] = set()
    with waits(found):
        step(2)
    assert found == (expected if DEVICE.type == "cuda" else set())


def test_a_wait_is_seen_and_named(device):  # noqa: F811
    found: set[str] = set()
    with waits(found):
        float(torch.ones(3, device=device).sum())
    assert bool(found) == (DEVICE.type == "cuda")


@NEEDS_CUDA
def test_memory_that_is_too_small_is_told_in_one_line(shards, device, tmp_path):  # noqa: F811
    """Room for the weights, and not for their gradients."""
    shape = ModelShape(
        N_VOCAB,
        128,
        layers=2,
        hidden_size=1024,
        heads=8,
        head_dim=128,
        intermediate_size=4096,
        context=16,
        rope_theta=1e4,
    )
    model = StudentLM(shape).to(device)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 2**26
    assert 4 * model.parameter_count() > 2**26
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(device).total_memory)
    try:
        with pytest.raises(UserError) as told:
            plan, optimizers = Plan("toy", STEPS, 0, SETTINGS), Optimizers(model, SETTINGS)
            train(model, batches_of(shards), CROSS_ENTROPY, plan, optimizers, look, tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(told.value)
    assert "batch.micro_batch_rows" in str(told.value)
