"""Has the cache paid? What the capture cost, what a step costs with and without it, and where the two ways meet."""

import math
import statistics
import time
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from microlm.config import Config
from microlm.corpus.batches import Batches, cached_windows
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import read_json
from microlm.models.model_files import load_student
from microlm.models.teacher_source import teacher_source
from microlm.pipeline.asked_objective import objective_schedule
from microlm.runtime.device import Runtime
from microlm.runtime.paths import CACHE, METRICS, MODELS, SHARDS
from microlm.runtime.terminal import banner, duration, progress_bar
from microlm.teacher.cache import REMAKE, TeacherCache, cache_identity
from microlm.teacher.recorders import LiveTeacher, Recorder, load_fitting_teacher
from microlm.training import losses
from microlm.training.loop import Feed, Loss, Replica, accumulate_gradients

TEACHER_METRICS = METRICS / "teacher.json"
ROUNDS = 3  # timed, after one that warms up
NOT_CACHED = {
    "minillm": "objective minillm samples text of its own, which no cache has labelled",
    "none": "alpha is 0 throughout, so that no step asks the teacher",
}


@dataclass(frozen=True)
class BreakEven:
    """Where capture and cached steps together have cost what live steps would have."""

    epochs: float | None = None  # over the cached windows; None where they never meet
    students: int | None = None  # the least whole number of trainings that the cache makes cheaper, or as cheap
    reason: str | None = None  # why they never meet


def break_even(
    capture_s: float, cached_step_s: float, live_step_s: float, steps_per_epoch: float, epochs: float
) -> BreakEven:
    """Solve capture + n cached = n live for the steps n, counted in epochs and in students of `epochs` each.

    Args:
        capture_s: seconds of the one pass of the teacher; steps in seconds each.
    """
    saved_s = (live_step_s - cached_step_s) * steps_per_epoch  # an epoch
    if not saved_s > 0:
        return BreakEven(reason="a step with the teacher live is not dearer than a step from its cache")
    needed = capture_s / saved_s
    if not math.isfinite(needed / epochs):
        return BreakEven(reason="what the cache saves is too little to be measured")
    return BreakEven(needed, max(1, math.ceil(needed / epochs)))


def ledger(config: Config, runtime: Runtime) -> dict[str, Any]:
    """The content of metrics/ledger.json. Seconds are those of this machine; the capture's, of the machine it ran on.

    A step here is forward and backward over `batch.batch_tokens` tokens; the optimizer's part is the same with and
    without a cache, and left out.
    """
    if config.at.teacher.source == "live":
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.source: live writes no cache, and the ledger times one; set "
            "cache and run dvc repro, or ask `microlm plan`, which prices both"
        )
    shards, batch = TokenShards(SHARDS, "train"), config.at.batch
    windows = cached_windows(shards, batch.seq_len, config.at.teacher.windows)
    cache = TeacherCache(CACHE, cache_identity(config.at.teacher, batch.seq_len, shards), windows)
    size = sum(path.stat().st_size for path in CACHE.iterdir())  # manifest and all
    teacher = captured(read_json(TEACHER_METRICS, "teacher"))
    reason = NOT_CACHED.get(config.objective, None if config.distills else NOT_CACHED["none"])
    batches = Batches(shards, batch, config.seed, windows)
    seconds = measure_steps(config, runtime, batches, None if reason else cache)
    cross_entropy, cached, live = (seconds.get(name) for name in ("cross_entropy", "cached", "live"))
    if not reason and teacher["capture_s"] is None:
        reason = "the last run of the capture found every block done, so that its speed is not known"
    epochs, steps_per_epoch = config.at.continuation.epochs, len(windows) / batch.rows
    met = BreakEven(reason=reason)
    if not reason:
        met = break_even(teacher["capture_s"], cached, live, steps_per_epoch, epochs)
    paid = {"epochs": rounded(met.epochs), "students": met.students, "epochs_a_student": epochs, "reason": met.reason}
    return {
        "objective": config.objective,
        "teacher": teacher,
        "cache": {"bytes": size, "bytes_per_token": round(size / (len(windows) * batch.seq_len), 2)},
        "step": {
            "tokens": batch.batch_tokens,
            "cross_entropy_s": rounded(cross_entropy),
            "cached_s": rounded(cached),
            "live_s": rounded(live),
            "cached_over_cross_entropy": rounded(cached / cross_entropy) if cached else None,
            "live_over_cached": rounded(live / cached) if cached else None,
        },
        "break_even": paid,
    }


def measure_steps(config: Config, runtime: Runtime, batches: Batches, cache: TeacherCache | None) -> dict[str, float]:
    """Median seconds of the gradients of a step by name; run in turn, after a round that warms up.

    Args:
        cache: None where no step asks the teacher; then there is cross-entropy alone.
    """
    student = load_student(MODELS / "control").set_activation_dtype(runtime.dtype).to(runtime.device)
    if runtime.compiled:
        student.compile_blocks()
    schedule = objective_schedule(config)
    variants: dict[str, Loss] = {"cross_entropy": losses.cross_entropy(student.n_vocab, schedule.z_loss)}
    if cache:
        # the capture's dtype, so that both ways say the same
        with config.naming_keys():
            source, as_captured = teacher_source(config.at.teacher), replace(runtime, dtype=cache.dtype)
            model = load_fitting_teacher(source, cache.identity, as_captured)
        live = LiveTeacher(Recorder(model, cache.identity, runtime.compiled), cache.tables)
        for name, teacher in (("cached", cache), ("live", live)):
            variants[name] = losses.Distillation(student.n_vocab, schedule, teacher)
    lines = [*runtime.lines(), f"step     {config.at.batch.batch_tokens:,} tokens, {ROUNDS} of each, in turn"]
    banner(f"ledger: {', '.join(name.replace('_', '-') for name in variants)}", lines)
    at_work = max((0.0, 0.5, 1.0), key=schedule.alpha)  # where in a training the teacher has most of a say
    feeds = {name: Feed(batches, loss, lambda _: at_work, runtime.device) for name, loss in variants.items()}
    replica, seconds = Replica(student), {name: [] for name in variants}
    with progress_bar((ROUNDS + 1) * len(feeds), 0, "step", "ledger") as bar:
        for turn, (name, feed) in product(range(ROUNDS + 1), feeds.items()):
            began = time.perf_counter()
            accumulate_gradients(replica, feed, turn)
            student.zero_grad(set_to_none=True)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize(runtime.device)
            seconds[name].append(time.perf_counter() - began)
            bar.update(1)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def captured(metrics: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the capture, from what stage `teacher` reported; a resumed one counts as if it had run in one go."""
    try:
        tokens, speed = metrics["tokens"], metrics["tokens_per_s"]
    except KeyError as error:
        raise UserError(f"{TEACHER_METRICS} lacks {error}; {REMAKE}") from None
    return {"tokens": tokens, "tokens_per_s": speed, "capture_s": round(tokens / speed, 1) if speed else None}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def summary(entries: dict[str, Any]) -> str:
    """The ledger in one line."""
    step, met, capture_s = entries["step"], entries["break_even"], entries["teacher"]["capture_s"]
    if met["epochs"] is None:
        return f"ledger: no break-even: {met['reason']}"
    return (
        f"ledger: a step takes {step['cross_entropy_s']:.2f} s with cross-entropy alone, {step['cached_s']:.2f} s from "
        f"the cache, {step['live_s']:.2f} s with the teacher live ({step['live_over_cached']:.2f} times the cached); "
        f"{duration(capture_s)} of capture have paid after {met['epochs']:.2f} epochs, with student {met['students']} "
        f"of {met['epochs_a_student']} epochs each"
    )
