"""The loop's promises: resume to the bit, alpha = 0 is the matched control, stop before damage."""

import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microlm.corpus.batches import Batches, evenly_spaced, read_batch
from microlm.errors import UserError
from microlm.files import write_json
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM
from microlm.objective.fused_head import HeadLoss
from microlm.objective.schedule import AlphaSchedule, ObjectiveSchedule
from microlm.parameters import BatchConfig, PretrainConfig
from microlm.runtime.resume import resumable
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, manifest_of
from microlm.teacher.capture import capture
from microlm.teacher.recorders import Recorder
from microlm.training import checkpoint
from microlm.training.average import Average
from microlm.training.checkpoint import MOMENTS, PROGRESS, STATE, WORK_PER_SAVE, Pace, save_checkpoint
from microlm.training.history import Evaluation, History
from microlm.training.loop import Evaluator, Interrupted, Loss, Plan, train
from microlm.training.losses import Distillation, cross_entropy, distances
from microlm.training.memory import Precision, training_memory
from microlm.training.optimizer import Optimizers, is_block_matrix, learning_rate_multiplier
from tests.support.toy import toy_shards

N_VOCAB, STEPS = 70, 12
BATCH = BatchConfig(seq_len=16, batch_tokens=64, micro_batch_rows=2)
SETTINGS = PretrainConfig(
    optimizer="muon", muon_learning_rate=0.02, learning_rate=0.003, weight_decay=0.1, schedule="warmup_stable_decay",
    warmup_fraction=0.1, decay_fraction=0.5, final_fraction=0.0, clip_norm=1.0, z_loss=0.0, evaluate_every=4,
    average="none", average_decay=0.6, validation_windows=4, hellaswag_items=4, tokens=768, windows="all")  # fmt: skip
CROSS_ENTROPY = cross_entropy(N_VOCAB, 0.0)


def reverse_kl(alpha: float, kind: str = "constant", end: float = 0.0) -> ObjectiveSchedule:
    return ObjectiveSchedule("rkl", AlphaSchedule(kind, alpha, end, 0.1, 0.5), 1.0, None, "lumped", 0.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return toy_shards(tmp_path_factory.mktemp("corpus"), N_VOCAB, tokens=900)


def student() -> StudentLM:
    shape = ModelShape(
        N_VOCAB, 128, layers=2, hidden_size=16, heads=2, head_dim=8, intermediate_size=24, context=16, rope_theta=1e4
    )
    return StudentLM(shape, seed=3)


def look(model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
    """A cheap stand-in for the real evaluator that depends on the weights."""
    seen = float(model.head_weight.detach().double().square().mean()) + 1
    return Evaluation(seen, seen, seen, {"acc_norm": 0.25, "acc": 0.25, "gold_bpb": seen})


def run(
    shards,
    directory: Path,
    loss: Loss = CROSS_ENTROPY,
    settings: PretrainConfig = SETTINGS,
    batch: BatchConfig = BATCH,
    evaluator: Evaluator = look,
) -> tuple[StudentLM, History]:
    model = student()
    batches = Batches(shards, batch, seed=1, windows=evenly_spaced(50, 30))
    history = train(
        model, batches, loss, Plan("toy", STEPS, 100, settings), Optimizers(model, settings), evaluator, directory
    )
    return model, history


def same_bits(a: StudentLM, b: StudentLM) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize(("optimizer", "average"), [("muon", "none"), ("adamw", "none"), ("muon", "ema")])
@pytest.mark.parametrize("stopped_after", [1, 4, 7])
def test_stopped_and_resumed_training_is_bit_identical(shards, tmp_path, stopped_after, optimizer, average):
    settings = replace(SETTINGS, optimizer=optimizer, average=average)
    calls = []

    def interrupting(*arguments) -> HeadLoss:
        calls.append(1)
        if len(calls) == 2 * (stopped_after + 2):  # two parts a step, after two rehearsed steps
            os.kill(os.getpid(), signal.SIGTERM)
        return CROSS_ENTROPY(*arguments)

    whole, whole_history = run(shards, tmp_path / "whole", settings=settings)
    with pytest.raises(Interrupted, match=rf"stopped after step {stopped_after} of {STEPS}"):
        run(shards, tmp_path / "broken", interrupting, settings)
    resumed, resumed_history = run(shards, tmp_path / "broken", settings=settings)
    assert same_bits(whole, resumed)
    for curve in ("loss", "hellaswag", "log"):
        assert getattr(whole_history, curve) == getattr(resumed_history, curve)
    assert not same_bits(whole, student())


def test_what_stays_is_the_moving_average_of_the_weights_after_each_step(shards, tmp_path):
    """By its definition, from plain trainings of every length: the steps are the same ones."""
    plain = replace(SETTINGS, schedule="warmup_stable_decay", warmup_fraction=0.0, decay_fraction=0.0)
    seen, decay, mean = [], 0.6, 0.0

    def watched(model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seen.append(model.head_weight.detach().double().clone())
        return look(model, train_windows)

    run(shards, tmp_path / "plain", settings=replace(plain, evaluate_every=1), evaluator=watched)
    weights, seen[:] = seen[1:], []  # without the start's
    settings = replace(plain, evaluate_every=STEPS, average="ema", average_decay=decay)
    averaged, _ = run(shards, tmp_path / "averaged", settings=settings, evaluator=watched)
    for step, after in enumerate(weights):
        kept = min(decay, step / (step + 1))  # the mean of all at first
        mean = kept * mean + (1 - kept) * after
    torch.testing.assert_close(averaged.head_weight.detach().double(), mean, rtol=1e-5, atol=1e-7)
    assert torch.equal(averaged.head_weight.detach().double(), seen[-1])  # the curve's last point is of what stays


@pytest.mark.parametrize("ids", [5, N_VOCAB])
def test_the_distance_to_a_teacher_is_both_kl_divergences_of_whole_logits_or_little_less(shards, tmp_path, ids):
    windows = evenly_spaced(50, 6)
    identity = CacheIdentity("toy", None, "toy", N_VOCAB, shards.digest, 16, 6, ids, (1.0,))
    teacher, model = student().eval(), student()
    torch.nn.init.normal_(model.head_weight, std=0.5, generator=torch.Generator().manual_seed(5))
    capture(Recorder(teacher, identity, compiled=False), shards, windows, tmp_path, 4, lambda tokens: None)
    write_json(tmp_path / MANIFEST, manifest_of(identity, "", "", tmp_path))
    found = distances(model, TeacherCache(tmp_path, identity, windows), shards, windows, rows=2)
    tokens = read_batch(shards, windows, 16).tokens
    with torch.no_grad():
        p, q = (torch.log_softmax(of.logits(of.hidden(tokens)).double(), -1) for of in (teacher, model))
    dense = {"fkl": (p.exp() * (p - q)).sum(-1).mean(), "rkl": (q.exp() * (q - p)).sum(-1).mean()}
    for name, value in dense.items():
        assert 0 < found[name] <= float(value) * (1 + 2e-3)
        assert ids < N_VOCAB or found[name] == pytest.approx(float(value), rel=2e-3)
    itself = distances(teacher, TeacherCache(tmp_path, identity, windows), shards, windows, rows=2)
    assert all(abs(value) < 1e-3 for value in itself.values())


def test_alpha_zero_distills_to_the_continued_control_bit_for_bit(shards, tmp_path):
    windows = evenly_spaced(50, 30)
    identity = CacheIdentity("toy", None, "toy", N_VOCAB, shards.digest, 16, 30, 5, (1.0,))
    (tmp_path / "cache").mkdir()
    record = Recorder(student().eval(), identity, compiled=False)
    capture(record, shards, windows, tmp_path / "cache", 4, lambda tokens: None)
    write_json(tmp_path / "cache" / MANIFEST, manifest_of(identity, "", "", tmp_path / "cache"))
    cache = TeacherCache(tmp_path / "cache", identity, windows)
    continued, _ = run(shards, tmp_path / "continued")
    undistilled, _ = run(shards, tmp_path / "zero", Distillation(N_VOCAB, reverse_kl(0.0), cache))
    distilled, _ = run(shards, tmp_path / "half", Distillation(N_VOCAB, reverse_kl(0.5), cache))
    never, _ = run(shards, tmp_path / "never", Distillation(N_VOCAB, reverse_kl(0.0, "linear", 0.0), cache))
    falling, _ = run(shards, tmp_path / "falling", Distillation(N_VOCAB, reverse_kl(0.5, "linear", 0.0), cache))
    assert same_bits(continued, undistilled) and same_bits(continued, never)
    assert not same_bits(continued, distilled)
    assert not same_bits(distilled, falling) and not same_bits(continued, falling)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_keeps_the_checkpoint(shards, tmp_path):
    calls = []

    def breaking(*arguments) -> HeadLoss:
        calls.append(1)
        loss = CROSS_ENTROPY(*arguments)
        return loss._replace(loss=loss.loss * float("nan")) if len(calls) > 2 * (6 + 2) else loss

    with pytest.raises(UserError, match=r"step 7 is not finite .*windows .*nothing was updated"):
        run(shards, tmp_path / "run", breaking)
    resumed, _ = run(shards, tmp_path / "run")  # from the checkpoint of step 4
    whole, _ = run(shards, tmp_path / "whole")
    assert same_bits(resumed, whole)


@pytest.mark.parametrize(
    ("rows", "mend"),
    [(2, r"lower batch.micro_batch_rows=2 in params.yaml, e.g. to 1: a step stays 64 tokens"),
     (4, r"lower batch.micro_batch_rows=4 in params.yaml, e.g. to 2"),
     (1, r"batch.micro_batch_rows is 1 already: lower batch.seq_len")],
)  # fmt: skip
@pytest.mark.parametrize("call", [1, 100])
def test_too_little_memory_is_told_with_the_plans_figure_and_the_key_to_lower(shards, tmp_path, call, rows, mend):
    """In the rehearsal, before the first step, or when a later step has less room."""
    calls, batch = [], replace(BATCH, micro_batch_rows=rows)

    def hungry(*arguments) -> HeadLoss:
        calls.append(1)
        if len(calls) == min(call, 3 * batch.rows // rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total ...\nmore")
        return CROSS_ENTROPY(*arguments)

    planned = training_memory(batch, Precision(4, False), student().shape, "muon", 1, device="cpu")["total"] / 1e9
    with pytest.raises(UserError, match=mend) as error:
        run(shards, tmp_path, hungry, batch=batch)
    told = str(error.value)
    assert told.startswith("toy: the memory of cpu is too small (CUDA out of memory. Tried to allocate 2.00 GiB);")
    assert f"the plan has {planned:.3g} GB" in told and "\n" not in told


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_rehearsal_holds_the_room_that_the_first_step_takes_and_no_more_later(optimizer):
    model = student()
    optimizers = Optimizers(model, replace(SETTINGS, optimizer=optimizer))
    with optimizers.room_for_state() as missing:
        pass
    gradients(model, 0)
    optimizers.step(1.0)
    assert missing == sum(t.nbytes for name, t in optimizers.state_tensors().items() if not name.endswith("/step"))
    with optimizers.room_for_state() as missing:
        assert missing == 0


def test_training_learns(shards, tmp_path):
    _, history = run(shards, tmp_path)
    losses = [float(line.split()[2]) for line in history.log if " train " in line]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    assert [row["step"] for row in history.loss] == [100, 104, 108, 112]


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=40))
def test_saving_takes_a_twentieth_of_the_training_and_a_kill_costs_no_more(points: list[tuple[float, float]]) -> None:
    """Points of (seconds of training, seconds that a save would take there)."""
    now, trained, saving, unsaved, last = 0.0, 0.0, [], 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=lambda: now))
        pace = Pace()
        for work, cost in points:
            now, trained, unsaved = now + work, trained + work, unsaved + work
            if pace.is_due():
                now += cost
                pace.saved(cost)
                saving, unsaved, last = [*saving, cost], 0.0, cost
            assert unsaved < WORK_PER_SAVE * last or unsaved == 0
    assert len(saving) >= 1 and sum(saving[:-1]) <= trained / WORK_PER_SAVE


def test_a_flipped_bit_in_a_checkpoint_is_refused(shards, tmp_path):
    model = student()
    optimizers = Optimizers(model, SETTINGS)
    save_checkpoint(tmp_path, model, optimizers, Average(model, SETTINGS), 4, History())
    path = tmp_path / STATE / MOMENTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"this checkpoint is damaged .*optimizer.safetensors.* remove that folder"):
        run(shards, tmp_path)
    assert (tmp_path / STATE / PROGRESS).exists()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_optimized_once_and_only_matrices_decay(optimizer):
    model = student()
    optimizers = Optimizers(model, replace(SETTINGS, optimizer=optimizer))
    groups = [group for each in optimizers._all for group in each.param_groups]
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for name, p in model.named_parameters() if is_block_matrix(name, p)}
    for group in groups:
        assert {id(p) in matrices for p in group["params"]} == {group["weight_decay"] > 0}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_state_taken_over_is_the_state_given_bit_for_bit_and_a_copy(optimizer):
    """A saved count is on the CPU; `load_state_dict` of its optimizer puts it where the next step wants it."""
    settings = replace(SETTINGS, optimizer=optimizer)
    models = student(), student()
    giver, taker = (Optimizers(model, settings) for model in models)
    for step in range(3):
        gradients(models[0], step)
        giver.step(0.5)
    given_, rates = {name: value.clone() for name, value in giver.state_tensors().items()}, taker.learning_rate
    taker.load_state_tensors(giver.state_tensors())
    models[1].load_state_dict(models[0].state_dict())
    taken = taker.state_tensors()
    assert taken.keys() == given_.keys() and len(taken) >= len(list(models[0].parameters()))
    assert all(torch.equal(taken[name], value) and taken[name].dtype == value.dtype for name, value in given_.items())
    assert taker.learning_rate == rates  # of the settings, not of the giver's last step
    for model, optimizers in zip(models, (giver, taker)):
        gradients(model, 3)
        optimizers.step(0.25)
    assert same_bits(*models) and taker.learning_rate == giver.learning_rate
    gradients(models[0], 4)
    giver.step(1.0)
    assert any(not torch.equal(value, giver.state_tensors()[name]) for name, value in taker.state_tensors().items())


def gradients(model: StudentLM, step: int) -> None:
    drawn = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=drawn)


def test_a_state_of_another_model_is_refused():
    with pytest.raises(KeyError, match=r"model\.layers\.9"):
        Optimizers(student(), SETTINGS).load_state_tensors({"model.layers.9.x/momentum_buffer": torch.zeros(1)})


@given(
    st.integers(1, 400),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 1),
    st.sampled_from(["warmup_stable_decay", "cosine"]),
)
def test_learning_rate_rises_stays_and_falls(steps, warmup, decay, final, schedule):
    config = replace(SETTINGS, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, final_fraction=final)
    rates = [learning_rate_multiplier(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = round(warmup * steps)
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :]))


def test_a_second_process_on_the_same_state_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with resumable("toy", {"alpha": 0.5}) as directory:
        (directory / "state").write_text("kept")
        with pytest.raises(UserError, match=r"another process is running"), resumable("toy", {"alpha": 0.5}):
            pass
        with resumable("toy", {"alpha": 0.2}) as other:  # another parameter is another state
            assert other != directory and not (other / "state").exists()
        assert (directory / "state").read_text() == "kept"
    assert not directory.exists()
