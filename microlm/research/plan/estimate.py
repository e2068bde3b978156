"""The plan of one scale: everything that its page says, as plain numbers."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from microlm.config import PARAMS, Config, load_config
from microlm.errors import UserError
from microlm.files import read_yaml
from microlm.models.student import parameter_count
from microlm.research.ledger import break_even
from microlm.research.plan import memory, work
from microlm.research.plan.measured import ASSUMED, Rate
from microlm.research.plan.sizes import corpus_size, student_shape, teacher_shape, vocabulary_of
from microlm.research.plan.storage import cache_bytes, cache_plan, storage
from microlm.training.memory import LIBRARIES_BYTES, Precision, training_memory


@dataclass(frozen=True)
class Machine:
    """`gpus` of one kind."""

    gpus: int = 1
    rate: Rate = ASSUMED
    price_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """Of one GPU at work."""
        return self.rate.peak_tflops * 1e12 * self.rate.utilisation


def config_of_scale(scale: str | None) -> Config:
    """params.yaml with another scale chosen than it says. UserError where that one is unknown or does not fit."""
    scales = read_yaml(PARAMS, "run from the top folder of the repository", "scale: laptop")["scales"]
    if scale is not None and scale not in scales:
        raise UserError(f"--scale: {scale!r} is not a scale of {PARAMS}; choose one of {', '.join(scales)}")
    return load_config(PARAMS) if scale is None else load_config(PARAMS, scale=scale)


def make_plan(config: Config, machine: Machine, teacher_parameters: int | None = None) -> dict[str, Any]:
    """All figures of the page but the disk's. UserError where something that decides them is not known."""
    if config.objective == "minillm":
        raise UserError(f"{PARAMS}: objective: minillm samples text in every step, which is not planned; set another")
    at = config.at
    vocabulary = vocabulary_of(at.corpus.tokenizer)
    shape, corpus = student_shape(config, vocabulary), corpus_size(at.corpus)
    teacher = teacher_shape(at.teacher.model, teacher_parameters)
    budget = work.Budget.build(config, corpus, shape, teacher)
    stages = work.stages(budget, machine.gpus)
    windows = budget.labelled
    layout = cache_plan(config, vocabulary, windows)
    record = layout.token_bytes
    return {
        "scale": config.scale,
        "machine": {"gpus": machine.gpus, **vars(machine.rate), "price_per_gpu_hour": machine.price_per_gpu_hour},
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
        "sources": _sources(budget, machine, cache_bytes(replace(layout, source="cache"))),
        "bytes": storage(config, corpus, vocabulary, shape, teacher, windows),
        "memory": _memory(config, machine, shape, teacher, cache_bytes(layout)),
    }


def _stage(one: work.Work, machine: Machine) -> dict[str, Any]:
    hours = one.hours(machine.gpus, machine.flops_per_s)
    price = machine.price_per_gpu_hour
    cost = None if price is None else price * hours * machine.gpus
    return {
        "tokens": one.tokens,
        "steps": one.steps,
        "flops": one.flops,
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


def _sources(budget: work.Budget, machine: Machine, cache_size: int) -> dict[str, Any]:
    """The teacher's part under either `teacher.source`: GPU-hours, and bytes that stay for as long as students come.

    `students_to_turn`: the first number of students for which the cache takes less.
    """
    epochs = budget.config.at.continuation.epochs
    once = budget.labelled * budget.config.at.batch.seq_len * budget.teacher_forward / machine.flops_per_s / 3600
    return {
        "cache": {"gpu_hours": once, "bytes": cache_size},
        "live": {"gpu_hours_a_student": epochs * once, "bytes": 0},
        "cheaper_for_one_student": "cache" if epochs > 1 else "live",  # at equal hours live spares the disk
        "students_to_turn": 1 // epochs + 1,
    }


def _memory(config: Config, machine: Machine, shape: Any, teacher: Any, cache_size: int) -> dict[str, dict[str, int]]:
    """By stage. `cpu` is the process's resident set without a GPU, `mapped` the file pages that come on top of it."""
    found = _held(config, machine.gpus, shape, teacher, "cuda")
    for name, one in _held(config, 1, shape, teacher, "cpu").items():
        loads = name == "teacher" or (name == "distill" and "teacher" in one)
        own = max(one["total"], memory.loading_bytes(config, teacher)) if loads else one["total"]
        found[name]["cpu"] = own + LIBRARIES_BYTES[config.at.runtime.compile == "auto"]
    if config.distills and config.at.teacher.source == "cache":
        found["distill"]["mapped"] = cache_size
    return found


def _held(config: Config, gpus: int, shape: Any, teacher: Any, device: str) -> dict[str, dict[str, int]]:
    """Bytes by stage and purpose on a kind of device."""
    at = config.at
    rates = at.pretrain if config.init == "scratch" else at.continuation
    precision, continued = Precision.of(at.runtime), Precision.of(config.continuation_runtime)
    top_k = at.teacher.top_k if config.distills else 0

    def training(narrowed: Precision, optimizer: str, ids: int = 0) -> dict[str, int]:
        return training_memory(at.batch, narrowed, shape, optimizer, gpus, ids, device)

    found = {
        "pretrain": training(precision, at.pretrain.optimizer),
        "continue": training(continued, rates.optimizer),
        "distill": training(continued, rates.optimizer, top_k),
        "teacher": memory.teacher_memory(config, teacher, shape.n_vocab, at.teacher.batch_rows, device),
    }
    if top_k and at.teacher.source == "live":
        live = memory.teacher_memory(config, teacher, shape.n_vocab, at.batch.micro_batch_rows, device)["total"]
        found["distill"] |= {"teacher": live, "total": found["distill"]["total"] + live}
    return found


def disk_here(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes that all of the pipeline's data need, what is already here included; free in this folder; lacking.

    `copies`: what DVC's cache takes on top where it copies outputs and does not link them.
    """
    needed, free = sum(plan["bytes"].values()), shutil.disk_usage(Path.cwd()).free
    copies = sum(value for name, value in plan["bytes"].items() if name.startswith(("data/", "models/")))
    return {"needed": needed, "copies": copies, "free": free, "lacking": max(0, needed - free)}
