"""The plan of one scale: everything that its page says, as plain numbers."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microlm.config import PARAMS, Config, ConfigError, load_config
from microlm.errors import UserError
from microlm.files import read_yaml
from microlm.pipeline.ledger import break_even
from microlm.plan import memory, work
from microlm.plan.memory import Precision
from microlm.plan.sizes import corpus_size, parameter_count, student_shape, teacher_shape, vocabulary_of
from microlm.plan.storage import cache_plan, storage
from microlm.scale import ScaleConfig
from microlm.schema import parse

H100_TFLOPS = 989.0  # dense bfloat16 of an H100 SXM, by its maker's data sheet


@dataclass(frozen=True)
class Machine:
    """Of one GPU: `peak_tflops` 10^12 operations a second, of which a run reaches `utilisation`."""

    gpus: int = 1
    peak_tflops: float = H100_TFLOPS
    utilisation: float = 0.4
    price_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """Of one GPU at work."""
        return self.peak_tflops * 1e12 * self.utilisation


def config_of_scale(scale: str | None) -> Config:
    """params.yaml with another scale chosen than it says. UserError where that one is unknown or does not fit."""
    config = load_config(PARAMS)
    if scale is None or scale == config.scale:
        return config
    blocks = read_yaml(PARAMS, "run from the top folder of the repository", "scale: laptop")["scales"]
    if scale not in blocks:
        raise UserError(f"--scale: {scale!r} is not a scale of {PARAMS}; choose one of {', '.join(blocks)}")
    found: list[str] = []
    config = replace(config, scale=scale, at=parse(ScaleConfig, blocks[scale], f"scales.{scale}.", found))
    if found := found + config.problems():
        raise ConfigError("\n".join(f"{PARAMS}: {line}" for line in found))
    return config


def make_plan(config: Config, machine: Machine, teacher_parameters: int | None = None) -> dict[str, Any]:
    """All figures of the page but the disk's. UserError where something that decides them is not known."""
    if config.objective == "minillm":
        raise UserError(f"{PARAMS}: objective: minillm samples text in every step, which is not planned; set another")
    at = config.at
    vocabulary = vocabulary_of(at.corpus.tokenizer)
    shape, corpus = student_shape(at, vocabulary), corpus_size(at.corpus)
    teacher = teacher_shape(at.teacher.model, teacher_parameters)
    budget = work.Budget.build(config, corpus, parameter_count(shape), teacher)
    stages = work.stages(budget, machine.gpus)
    windows = budget.labelled
    record = cache_plan(config, vocabulary, windows).token_bytes
    return {
        "scale": config.scale,
        "machine": vars(machine),
        "student": {"parameters": parameter_count(shape), **vars(shape)},
        "teacher": {"model": at.teacher.model, **vars(teacher)},
        "tokens": {"train": corpus.train_tokens, "val": corpus.val_tokens, "labelled": windows * at.batch.seq_len},
        "flops_per_token": {"training": 3 * budget.student_forward, "teacher": budget.teacher_forward},
        "stages": {name: _stage(one, machine) for name, one in stages.items()},
        "uncounted_tasks": work.uncounted_tasks(config),
        "busy_share": work.busy_share(config, machine.gpus),
        "micro_batches": at.batch.rows // at.batch.micro_batch_rows,
        "break_even": _break_even(budget, machine, record),
        "cache_bytes_per_token": record,
        "bytes": storage(config, corpus, vocabulary, shape, teacher, windows),
        "memory": _memory(config, machine, shape, teacher, windows * at.batch.seq_len * record),
    }


def _stage(one: work.Work, machine: Machine) -> dict[str, Any]:
    hours = one.hours(machine.gpus, machine.flops_per_s)
    price = machine.price_per_gpu_hour
    cost = None if price is None else price * hours * machine.gpus
    return {
        "tokens": one.tokens,
        "steps": one.steps,
        "flops": one.flops,
        "evaluation_flops": one.evaluation_flops,
        "gpu_hours": hours * machine.gpus,
        "hours": hours,
        "price": cost,
    }


def _break_even(budget: work.Budget, machine: Machine, record_bytes: int) -> dict[str, Any]:
    """The ledger's law on these figures: live, a step costs the teacher's forward pass more than from the cache."""
    at = budget.config.at
    steps_per_epoch = budget.labelled / at.batch.rows
    live_s = at.batch.batch_tokens * budget.teacher_forward / machine.flops_per_s
    met = break_even(live_s * steps_per_epoch, 0.0, live_s, steps_per_epoch, at.continuation.epochs)
    step_s = at.batch.batch_tokens * 3 * budget.student_forward / machine.flops_per_s
    return {
        "epochs": met.epochs,
        "students": met.students,
        "epochs_a_student": at.continuation.epochs,
        "live_over_cached": (step_s + live_s) / step_s,
        "read_bytes_per_s": at.batch.batch_tokens * record_bytes / step_s,  # of the cache, by one GPU
    }


def _memory(config: Config, machine: Machine, shape: Any, teacher: Any, cache_size: int) -> dict[str, dict[str, int]]:
    """By stage. `cpu` is the process's resident set without a GPU, `mapped` the file pages that come on top of it."""
    at = config.at
    rates = at.pretrain if config.init == "scratch" else at.continuation
    precision, continued = Precision.of(at.runtime), Precision.of(config.continuation_runtime)
    top_k = at.teacher.top_k if config.distills else 0
    found = {
        "pretrain": memory.training_memory(at.batch, precision, shape, at.pretrain.optimizer, machine.gpus),
        "continue": memory.training_memory(at.batch, continued, shape, rates.optimizer, machine.gpus),
        "distill": memory.training_memory(at.batch, continued, shape, rates.optimizer, machine.gpus, top_k),
        "teacher": memory.capture_memory(config, teacher, shape.n_vocab),
    }
    for name, one in found.items():
        own = max(one["total"], memory.loading_bytes(config, teacher)) if name == "teacher" else one["total"]
        one["cpu"] = own + memory.LIBRARIES_BYTES[at.runtime.compile == "auto"]
    if top_k:
        found["distill"]["mapped"] = cache_size
    return found


def disk_here(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes that all of the pipeline's data need, what is already here included; free in this folder; lacking.

    `copies`: what DVC's cache takes on top where it copies outputs and does not link them.
    """
    needed, free = sum(plan["bytes"].values()), shutil.disk_usage(Path.cwd()).free
    copies = sum(value for name, value in plan["bytes"].items() if name.startswith(("data/", "models/")))
    return {"needed": needed, "copies": copies, "free": free, "lacking": max(0, needed - free)}
