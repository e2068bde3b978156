"""The plan of one scale on a machine: everything that its page says, as plain numbers."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.config import PARAMS, Config, config_of, load_config
from microlm.corpus.parts import GEMMA3_MODEL, OPT_IN, PARTS, SMOLLM2, needed_parts
from microlm.corpus.shards import HEADER, token_dtype
from microlm.errors import UserError
from microlm.evaluation.tasks.benchmarks import configured_benchmarks
from microlm.files import read_yaml
from microlm.models.student import parameter_count
from microlm.parameters import OptimizationConfig
from microlm.research.plan.sizes import Sizes
from microlm.teacher.capture import TABLE_WINDOWS
from microlm.teacher.recorders import GROUPS, HEAD_ROWS, head_rows
from microlm.training.memory import FLOAT32, LIBRARIES_BYTES, Precision, optimizer_bytes, training_memory

HELLASWAG_TOKENS = 174  # that a question costs, its context read once: mean over every tenth question, OLMo's tokens
HELLASWAG_QUESTIONS = 10_042
WEIGHT_PARTS = {"packaged": (SMOLLM2,), GEMMA3_MODEL: OPT_IN}  # by packaged teacher
GEMMA3_TOKENIZER_BYTES = 630_000_000  # of 262,144 pieces and 513,511 merges, and the file's metadata
MEASURED = Path(__file__).parents[3] / "bench" / "gpu"
AGAIN = "delete it, or measure again: make gpu"


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind: operations a second of one at its best, the share that a run reaches, and who says so."""

    gpus: int = 1
    # dense bfloat16 of an H100 SXM, by its maker's data sheet; the share is what llm.c and nanochat report at 124M
    peak_tflops: float = 989.0
    utilisation: float = 0.4
    source: str = "assumed, not measured"
    price_per_gpu_hour: float | None = None

    @property
    def flops_per_s(self) -> float:
        """Of one GPU at work."""
        return self.peak_tflops * 1e12 * self.utilisation

    def work(self, tokens: int, flops: float, steps: int | None = None, busy: float = 1.0) -> dict[str, Any]:
        """A stage's work, its wall-clock hours and price. `busy`: share of the GPUs that have something to do."""
        hours = flops / (self.gpus * busy) / self.flops_per_s / 3600
        return {
            "tokens": tokens,
            "steps": steps,
            "flops": flops,
            "gpu_hours": hours * self.gpus,
            "hours": hours,
            "price": None if self.price_per_gpu_hour is None else self.price_per_gpu_hour * hours * self.gpus,
        }


def machine_of(card: str | None, folder: Path = MEASURED) -> Machine:
    """One GPU, as `python -m bench.gpu` left its figures in <card>.json: `card`, or where None the only one measured;
    what is assumed where none or several were.

    UserError where `card` was not measured, or a file is damaged.
    """
    known = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            peak, share = content.get("peak_tflops"), content.get("utilisation")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); {AGAIN}") from None
        if peak is None or share is None:
            continue  # its steps were not timed
        numbers = all(isinstance(value, int | float) and value > 0 for value in (peak, share))
        if not numbers or share > 1:
            raise UserError(f"{path}: peak_tflops {peak!r} and utilisation {share!r} are no rate; {AGAIN}")
        source = f"measured on this card: {path.parent.name}/{path.name}"
        known[path.stem] = Machine(1, float(peak), float(share), source)
    if card is None:
        return next(iter(known.values())) if len(known) == 1 else Machine()
    if card not in known:
        raise UserError(f"--card: {card!r} was not measured; known: {', '.join(known) or 'none yet (make gpu)'}")
    return known[card]


def config_of_scale(scale: str | None) -> Config:
    """params.yaml with another scale chosen than it says. UserError where that one is unknown or does not fit."""
    if scale is None:
        return load_config(PARAMS)
    raw = read_yaml(PARAMS, "run from the top folder of the repository", "scale: laptop")
    scales = raw.get("scales")
    if isinstance(scales, dict) and scale not in scales:
        raise UserError(f"--scale: {scale!r} is not a scale of {PARAMS}; choose one of {', '.join(scales)}")
    return config_of(raw | {"scale": scale}, PARAMS)


def make_plan(config: Config, machine: Machine, teacher_parameters: int | None = None) -> dict[str, Any]:
    """All figures of the page but the disk's. UserError where something that decides them is not known."""
    if config.objective == "minillm":
        raise UserError(f"{PARAMS}: objective: minillm samples text in every step, which is not planned; set another")
    at, sizes = config.at, Sizes(config, teacher_parameters)
    benchmarks = {benchmark.task for benchmark in configured_benchmarks(at.evaluation.benchmarks)}
    return {
        "scale": config.scale,
        "machine": {**vars(machine)},
        "student": {"parameters": parameter_count(sizes.student), **vars(sizes.student)},
        "teacher": {"model": at.teacher.model, **vars(sizes.teacher)},
        "tokens": {"train": sizes.train_tokens, "val": sizes.val_tokens, "labelled": sizes.labelled_tokens},
        "flops_per_token": {"training": 3 * sizes.student_forward, "teacher": sizes.teacher_forward},
        "stages": _stages(sizes, machine),
        "uncounted_tasks": sorted(benchmarks - {"hellaswag"}),  # how long their questions are is known with their data
        "busy_share": busy_share(config, machine.gpus),
        "micro_batches": at.batch.micro_batches,
        **_cache_or_live(sizes, machine),
        "bytes": _storage(sizes),
        "memory": _memory(sizes, machine.gpus),
    }


def busy_share(config: Config, gpus: int) -> float:
    """Share of `gpus` that work in a training: a step's micro-batches are dealt out whole."""
    parts = config.at.batch.micro_batches
    return parts / (gpus * math.ceil(parts / gpus))


def _stages(sizes: Sizes, machine: Machine) -> dict[str, dict[str, Any]]:
    """Work of each stage that computes; of `evaluate` held-out text and HellaSwag, three students and the teacher.

    A backward pass takes twice a forward pass. What our head computes twice to save memory is not counted: utilisation
    is of the model's operations.
    """
    config, at, batch = sizes.config, sizes.config.at, sizes.config.at.batch
    student, teacher = sizes.student_forward, sizes.teacher_forward
    continued = at.continuation.epochs * sizes.labelled // batch.rows
    rates = at.pretrain if config.init == "scratch" else at.continuation

    def training(steps: int, rates: OptimizationConfig, live: int = 0) -> dict[str, Any]:
        tokens, points = steps * batch.batch_tokens, math.ceil(steps / rates.evaluate_every) + 1
        seen = sizes.held_out(rates.validation_windows) + rates.hellaswag_items * HELLASWAG_TOKENS
        flops = tokens * (3 * student + live) + points * seen * student
        return machine.work(tokens, flops, steps, busy_share(config, machine.gpus))

    cached = sizes.labelled_tokens if at.teacher.source == "cache" else 0
    apart = min(TABLE_WINDOWS, sizes.labelled) + min(at.pretrain.validation_windows, sizes.windows(sizes.val_tokens))
    judged = sizes.held_out(at.evaluation.windows)
    for benchmark in configured_benchmarks(at.evaluation.benchmarks):
        if benchmark.task == "hellaswag":
            judged += min(benchmark.limit or HELLASWAG_QUESTIONS, HELLASWAG_QUESTIONS) * HELLASWAG_TOKENS
    found = {
        "pretrain": training(at.pretrain.tokens // batch.batch_tokens, at.pretrain),
        "teacher": machine.work(cached, (cached + apart * batch.seq_len) * teacher),
        "continue": training(continued, rates),
        "distill": training(continued, rates, teacher if config.distills and at.teacher.source == "live" else 0),
        "evaluate": machine.work(4 * judged, judged * (3 * student + teacher)),
    }
    if at.continuation.windows == "difference":
        found["select"] = machine.work(sizes.labelled_tokens, sizes.labelled_tokens * student)
    return found


def _cache_or_live(sizes: Sizes, machine: Machine) -> dict[str, Any]:
    """The teacher's part under either `teacher.source`: GPU-hours, and bytes that stay for as long as students come.

    `break_even`: at one speed of both models, labelling once costs what one epoch with the teacher live costs.
    `students_to_turn`: the first number of students for which the cache takes less.
    """
    batch, epochs = sizes.config.at.batch, sizes.config.at.continuation.epochs
    live_s = batch.batch_tokens * sizes.teacher_forward / machine.flops_per_s
    step_s = batch.batch_tokens * 3 * sizes.student_forward / machine.flops_per_s
    once = sizes.labelled_tokens * sizes.teacher_forward / machine.flops_per_s / 3600
    return {
        "break_even": {
            "epochs": 1.0,
            "students": 1,
            "epochs_a_student": epochs,
            "live_over_cached": (step_s + live_s) / step_s,
            "read_bytes_per_s": batch.batch_tokens * sizes.cache.token_bytes / step_s,  # of the cache, by one GPU
        },
        "cache_bytes_per_token": sizes.cache.token_bytes,
        "sources": {
            "cache": {"gpu_hours": once, "bytes": sizes.cache_bytes("cache")},
            "live": {"gpu_hours_a_student": epochs * once, "bytes": 0},
            "cheaper_for_one_student": "cache" if epochs > 1 else "live",  # at equal hours live spares the disk
            "students_to_turn": 1 // epochs + 1,
        },
    }


def _storage(sizes: Sizes) -> dict[str, int]:
    """Bytes on disk by what holds them. Two whole checkpoints exist while one replaces the other."""
    at, beside, width = sizes.config.at, sizes.vocabulary.file_bytes, token_dtype(sizes.vocabulary.size).itemsize
    weights = FLOAT32 * parameter_count(sizes.student)
    moments = optimizer_bytes(sizes.student, at.pretrain.optimizer)
    splits = (sizes.train_tokens, sizes.val_tokens)
    shards = sum(tokens * width + -(-tokens // at.corpus.shard_tokens) * HEADER.size for tokens in splits)
    found = {
        "data/parts": 2 * sum(PARTS[name].bytes for name in needed_parts(at)),  # what is taken out is smaller
        "data/shards": shards + beside,
        "data/outside": width * sizes.outside_tokens,
        "data/teacher": sizes.cache_bytes(at.teacher.source),
        "models/start": weights + beside,
        "models/control": weights + moments + beside,
        "models/continued": weights + beside,
        "models/student": weights + beside,
        "checkpoint": 2 * (weights + moments),
    }
    local = at.teacher.model in WEIGHT_PARTS or Path(at.teacher.model).is_dir()
    # published in float32 more often than not
    return found if local else found | {"teacher's weights": FLOAT32 * sizes.teacher.parameters}


def _memory(sizes: Sizes, gpus: int) -> dict[str, dict[str, int]]:
    """By stage. `cpu` is the process's resident set without a GPU, `mapped` the file pages that come on top of it."""
    config, runtime = sizes.config, sizes.config.at.runtime
    found, loading = _held(sizes, gpus, "cuda"), 0
    if config.at.teacher.model in WEIGHT_PARTS:  # float32 tensors, and their copy; the file's pages come and go
        loading = (FLOAT32 + Precision.of(runtime).activation_bytes) * sizes.teacher.parameters
    for name, one in _held(sizes, 1, "cpu").items():
        own = max(one["total"], loading) if name == "teacher" or "teacher" in one else one["total"]
        if config.at.teacher.model == GEMMA3_MODEL and name == "teacher":
            own += GEMMA3_TOKENIZER_BYTES
        found[name]["cpu"] = own + LIBRARIES_BYTES[runtime.compile == "auto"]
    if config.distills and config.at.teacher.source == "cache":
        found["distill"]["mapped"] = sizes.cache_bytes("cache")
    return found


def _held(sizes: Sizes, gpus: int, device: str) -> dict[str, dict[str, int]]:
    """Bytes by stage and purpose on a kind of device. Of a teacher without its shape only the weights are known."""
    config, at, shape = sizes.config, sizes.config.at, sizes.teacher
    rates = at.pretrain if config.init == "scratch" else at.continuation
    continued, top_k = Precision.of(config.continuation_runtime), at.teacher.top_k if config.distills else 0
    a, padded = Precision.of(at.runtime).activation_bytes, -(-sizes.vocabulary.size // GROUPS) * GROUPS
    logit = FLOAT32 if device == "cuda" else a

    def training(precision: Precision, of: OptimizationConfig, ids: int = 0) -> dict[str, int]:
        return training_memory(at.batch, precision, sizes.student, of.optimizer, gpus, ids, device, of.average)

    def teacher(rows: int) -> dict[str, int]:
        head = padded * (a * shape.hidden_size + logit * HEAD_ROWS[device])
        if at.teacher.model == GEMMA3_MODEL:  # projected: logits, the same in float32, over a temperature, and softmax
            ids = shape.padded_vocab
            head = ids * (a + 3 * FLOAT32) * head_rows(device, ids)
        held = {
            "weights": a * shape.parameters,
            "activations": a * rows * at.batch.seq_len * (4 * shape.hidden_size + 3 * shape.intermediate_size),
            "head": head,
        }
        return {**held, "total": sum(held.values())}

    found = {
        "pretrain": training(Precision.of(at.runtime), at.pretrain),
        "continue": training(continued, rates),
        "distill": training(continued, rates, top_k),
        "teacher": teacher(at.teacher.batch_rows),
    }
    if top_k and at.teacher.source == "live":
        live = teacher(at.batch.micro_batch_rows)["total"]
        found["distill"] |= {"teacher": live, "total": found["distill"]["total"] + live}
    return found


def disk_here(plan: dict[str, Any]) -> dict[str, int]:
    """Bytes that all of the pipeline's data need, what is already here included; free in this folder; lacking.

    `copies`: what DVC's cache takes on top where it copies outputs and does not link them.
    """
    needed, free = sum(plan["bytes"].values()), shutil.disk_usage(Path.cwd()).free
    copies = sum(value for name, value in plan["bytes"].items() if name.startswith(("data/", "models/")))
    return {"needed": needed, "copies": copies, "free": free, "lacking": max(0, needed - free)}
