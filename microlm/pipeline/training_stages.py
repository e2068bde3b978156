"""Assemble and run one arm: control, continued or student. The loss alone differs between the last two."""

import time
from dataclasses import asdict, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from microlm.config import Config, load_config
from microlm.corpus.batches import Batches, cached_windows, uncached_windows
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import ParameterError, UserError
from microlm.evaluation.scoring.yardsticks import held_out
from microlm.files import sha256_file, write_json
from microlm.models.interface import LanguageModel
from microlm.models.model_files import OPTIMIZER, WEIGHTS, load_student, save_student
from microlm.models.student import StudentLM
from microlm.models.teacher_source import teacher_source
from microlm.objective.on_policy import MiniLLM
from microlm.parameters import BatchConfig, OptimizationConfig
from microlm.pipeline.asked_objective import objective_schedule
from microlm.pipeline.evaluator import Evaluator
from microlm.pipeline.select import WINDOWS, chosen_windows
from microlm.runtime import distributed
from microlm.runtime.device import Runtime, peak_memory_bytes
from microlm.runtime.launcher import PROCESSES
from microlm.runtime.paths import CACHE, METRICS, MODELS, PLOTS, SHARDS, START, TRAINED_MODELS
from microlm.runtime.resume import resumable, stage_code
from microlm.runtime.terminal import banner
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import CacheIdentity, TeacherCache, cache_identity
from microlm.teacher.live_teacher import LiveTeacher
from microlm.teacher.loading import load_fitting_teacher, load_labelling_teacher
from microlm.training import losses
from microlm.training.loop import Loss, Plan, train
from microlm.training.optimizer import Optimizers

CROSS_ENTROPY = "cross-entropy"


def pretrain(config: Config, runtime: Runtime) -> None:
    """The control, from scratch: models/control, metrics and curves."""
    shards, tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    at = config.at
    model = load_student(START)
    _refuse_other_vocabulary(model, tokenizer, START)
    windows = None
    if at.pretrain.windows == "uncached":
        windows = uncached_windows(shards, at.batch.seq_len, at.teacher.windows)
    batches = Batches(shards, at.batch, config.seed, windows)
    plan = Plan("control", at.pretrain.tokens // at.batch.batch_tokens, 0, at.pretrain)
    loss = losses.cross_entropy(model.n_vocab, at.pretrain.z_loss)
    inputs: dict[str, object] = {"start": sha256_file(START / WEIGHTS)}
    _run(model, batches, loss, plan, CROSS_ENTROPY, config, runtime, tokenizer, inputs)


def continue_control(config: Config, runtime: Runtime) -> None:
    """The matched control: cross-entropy, everything else as in `distill`."""
    start = _Start(config)
    loss = losses.cross_entropy(start.model.n_vocab, start.rates.z_loss)
    start.run("continued", loss, CROSS_ENTROPY, config, runtime, {})


def distill(config: Config, runtime: Runtime) -> None:
    """The student: (1 - alpha) CE + alpha D, D from the teacher's cache or from the teacher itself."""
    start, asked = _Start(config, config.distills), objective_schedule(config)
    identity = cache_identity(config.at.teacher, config.at.batch.seq_len, start.shards)
    inputs: dict[str, object] = {"objective": asdict(asked)}
    if config.objective == "minillm":
        teacher = _live_sampler(config, identity, runtime)
        sampler = MiniLLM(start.model, teacher, config.at.on_policy, config.seed)
        loss = losses.on_policy(start.model.n_vocab, asked, sampler)
        weights = teacher_source(config.at.teacher).fingerprint(teacher)
        inputs |= {"on_policy": asdict(config.at.on_policy), "teacher": weights}
    else:
        labelled = cached_windows(start.shards, identity.seq_len, config.at.teacher.windows)
        teacher: losses.Teacher = TeacherCache(CACHE, identity, labelled)
        if identity.source == "live" and config.distills:
            teacher = _live(teacher, config, runtime, start.tokenizer)
        loss = losses.Distillation(start.model.n_vocab, asked, teacher)
        inputs |= {"cache": sha256_file(CACHE / cache_module.MANIFEST)}
    start.run("student", loss, asked.describe(), config, runtime, inputs)


def _live_sampler(config: Config, identity: CacheIdentity, runtime: Runtime) -> LanguageModel:
    with config.naming_keys():
        try:
            return load_fitting_teacher(teacher_source(config.at.teacher), identity, runtime)
        except ParameterError:
            raise
        except UserError as error:
            raise UserError(
                f"{error}. objective: minillm samples from the teacher in every step, which its cache cannot serve"
            ) from None


def _live(stage: TeacherCache, config: Config, runtime: Runtime, tokenizer: Tokenizer) -> LiveTeacher:
    """The teacher at work in the steps, in the dtype of stage `teacher`, whose manifest and table are in `stage`."""
    runtime = replace(runtime, dtype=stage.dtype)
    with config.naming_keys():
        model, pushed = load_labelling_teacher(teacher_source(config.at.teacher), stage.identity, runtime, tokenizer)
    return LiveTeacher(model, stage.identity, stage.tables, runtime.compiled, pushed)


class _Start:
    """Where `continue` and `distill` set out, the same for both: weights, windows, steps and rates."""

    def __init__(self, config: Config, distilling: bool = False) -> None:
        at = config.at
        self.shards, self.tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
        self.inputs: dict[str, object] = {"windows": sha256_file(WINDOWS) if WINDOWS.exists() else None}
        self.rates: OptimizationConfig = at.continuation
        self.first_step = at.pretrain.tokens // at.batch.batch_tokens
        weights = MODELS / "control"
        if config.init == "scratch":
            weights, self.rates, self.first_step = START, at.pretrain, 0
        elif distilling:
            self.rates = at.continuation.of_student()
        self.model = load_student(weights)
        self.inputs |= {weights.name: sha256_file(weights / WEIGHTS)}
        _refuse_other_vocabulary(self.model, self.tokenizer, weights)
        self.batches = Batches(self.shards, at.batch, config.seed, chosen_windows(config, self.shards))
        labelled = len(cached_windows(self.shards, at.batch.seq_len, at.teacher.windows))
        self.steps = at.continuation.epochs * labelled // at.batch.rows

    def run(self, arm: str, loss: Loss, said: str, config: Config, runtime: Runtime, inputs: dict[str, object]) -> None:
        plan = Plan(arm, self.steps, self.first_step, self.rates)
        _run(self.model, self.batches, loss, plan, said, config, runtime, self.tokenizer, self.inputs | inputs)


def _refuse_other_vocabulary(model: StudentLM, tokenizer: Tokenizer, directory: Path) -> None:
    if model.n_vocab != tokenizer.n_vocab:
        raise UserError(
            f"{directory} has {model.n_vocab} tokens, data/shards {tokenizer.n_vocab}; make it again with: "
            f"dvc repro {TRAINED_MODELS.get(directory.name, directory.name)}"
        )


def _run(
    model: StudentLM,
    batches: Batches,
    loss: Loss,
    plan: Plan,
    said: str,
    config: Config,
    runtime: Runtime,
    tokenizer: Tokenizer,
    inputs: dict[str, object],
) -> None:
    """Train, then write the model, the curves, the log and the metrics of the arm."""
    refuse_idle_processes(config.at.batch)
    model.set_activation_dtype(runtime.dtype).to(runtime.device)
    if runtime.compiled:
        model.compile_blocks()
    optimizers = Optimizers(model, plan.optimization)
    if getattr(plan.optimization, "optimizer_state", "reset") == "keep":
        _load_moments(optimizers, MODELS / "control" / OPTIMIZER)
    banner(f"{plan.name}: {model.parameter_count():,} parameters", describe(model, batches, plan, said, runtime))
    texts = held_out(config.at)
    evaluator = Evaluator.build(batches.shards, texts, tokenizer, config.at.batch, plan.optimization, model.context)
    inputs |= {
        "plan": asdict(plan),
        "batch": asdict(config.at.batch),
        "shape": asdict(model.shape),
        "seed": config.seed,
        "runtime": runtime.decisive(),
        "corpus": [batches.shards.digest, *evaluator.digests, tokenizer.fingerprint],
        "code": stage_code(TRAINED_MODELS[plan.name]),
    }
    began = time.perf_counter()
    with resumable(plan.name, inputs) as directory:
        history = train(model, batches, loss, plan, optimizers, evaluator, directory)
        moments = optimizers.state_tensors() if plan.name == "control" else None
        if not distributed.is_first():
            return
        save_student(model, tokenizer, MODELS / plan.name, moments)
        history.write(plan.name, PLOTS, METRICS)
        last, hellaswag = history.loss[-1], history.hellaswag[-1]
        write_json(
            METRICS / f"{plan.name}.json",
            {
                "arm": plan.name,
                "parameters": model.parameter_count(),
                "steps": plan.steps,
                "tokens_before": plan.first_step * config.at.batch.batch_tokens,
                "tokens": plan.steps * config.at.batch.batch_tokens,
                "epochs": round(plan.steps * config.at.batch.rows / len(batches.windows), 3),
                "train_loss": last["train_loss"],
                "val_loss": last["val_loss"],
                **{key: last[key] for key in ("val_bpb", "ood_bpb") if last[key] is not None},
                "hellaswag_acc_norm": hellaswag["acc_norm"],
                "tokens_per_s": round(history.trained_tokens / max(history.elapsed_s, 1e-9), 1),
                "elapsed_s": round(time.perf_counter() - began, 1),
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )


def micro_batches(batch: BatchConfig) -> int:
    """Forward passes of one step: as many processes can share it."""
    return batch.rows // batch.micro_batch_rows


def most_processes() -> int:
    """Processes that a training of params.yaml has work for."""
    return micro_batches(load_config().at.batch)


def refuse_idle_processes(batch: BatchConfig) -> None:
    """Several processes deal a step's micro-batches among them, and each needs one."""
    parts, size = micro_batches(batch), distributed.size()
    if size > parts:
        raise UserError(
            f"{size} processes cannot share the {parts} micro-batches of a step (batch.batch_tokens / "
            f"(batch.micro_batch_rows * batch.seq_len) in params.yaml); set {PROCESSES}={parts}, or lower "
            f"batch.micro_batch_rows to {max(1, batch.rows // size)}"
        )


def _load_moments(optimizers: Optimizers, path: Path) -> None:
    try:
        optimizers.load_state_tensors(load_file(path))
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: the control's optimizer state is absent or damaged ({error}); make it again with: "
            "dvc repro -f -s pretrain, or set continuation.optimizer_state: reset"
        ) from None


def describe(model: StudentLM, batches: Batches, plan: Plan, said: str, runtime: Runtime) -> list[str]:
    """The banner: each choice and its reason, and the arithmetic of a step."""
    batch, settings = batches.config, plan.optimization
    parts = micro_batches(batch)
    windows, tokens = len(batches.windows), batch.batch_tokens
    epochs = plan.steps * batch.rows / windows
    matrices = f"{settings.muon_learning_rate:g} (matrices), " if settings.optimizer == "muon" else ""
    return [
        *runtime.lines(),
        f"model    {model.shape.layers} layers, {model.shape.hidden_size} wide, vocabulary {model.n_vocab:,}",
        f"step     {tokens:,} tokens = {batch.micro_batch_rows} windows x {batch.seq_len} tokens x {parts} parts",
        f"steps    {plan.steps:,}: {plan.steps * tokens:,} tokens, {epochs:.2f} epochs of {windows:,} windows",
        f"loss     {said}",
        f"rate     {settings.optimizer}, {settings.schedule}, peak {matrices}{settings.learning_rate:g}",
    ]
