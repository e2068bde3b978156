"""Assemble and run one arm: control, continued or student. The loss alone differs between the last two."""

import time
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from microlm import model as model_module
from microlm.config import Config
from microlm.console import banner
from microlm.corpus import batches as batches_module
from microlm.corpus.batches import Batch, Batches, cached_windows, uncached_windows
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError
from microlm.files import sha256_file, write_json
from microlm.hub import OPTIMIZER, WEIGHTS, load_student, save_student
from microlm.model import ModelShape, StudentLM
from microlm.objective import divergences, fused_head
from microlm.objective.fused_head import HeadLoss, Objective, fused_head_loss
from microlm.pipeline.evaluator import Evaluator
from microlm.runtime import Runtime, peak_memory_bytes
from microlm.scratch import code_digest, scratch
from microlm.teacher import cache as cache_module
from microlm.teacher.cache import TeacherCache, cache_identity
from microlm.training import loop, optimizer
from microlm.training.loop import Loss, Plan, train
from microlm.training.optimizer import Optimizers

SHARDS, CACHE, MODELS = Path("data/shards"), Path("data/teacher"), Path("models")
PLOTS, METRICS = Path("plots"), Path("metrics")
CROSS_ENTROPY = "cross-entropy"
VOCABULARY_MULTIPLE = 64  # rows of the embedding: matrix products like round shapes
CODE = (model_module, batches_module, divergences, fused_head, cache_module, loop, optimizer)


def cross_entropy(n_vocab: int, z_loss: float) -> Loss:
    """The loss of `pretrain` and `continue`."""
    objective = Objective(z_loss=z_loss)

    def loss(hidden: Tensor, weight: Tensor, batch: Batch, count: int) -> HeadLoss:
        targets = batch.targets.to(hidden.device).flatten()
        return fused_head_loss(hidden, weight, targets, n_vocab, objective, count=count)

    return loss


def distillation(n_vocab: int, objective: Objective, cache: TeacherCache) -> Loss:
    """The loss of `distill`. With alpha = 0 the cache is not read and the bits are those of `cross_entropy`."""

    def loss(hidden: Tensor, weight: Tensor, batch: Batch, count: int) -> HeadLoss:
        targets = batch.targets.to(hidden.device).flatten()
        teacher = cache.teacher(batch.windows, objective.temperature, hidden.device) if objective.alpha > 0 else None
        return fused_head_loss(hidden, weight, targets, n_vocab, objective, teacher, count)

    return loss


def pretrain(config: Config, runtime: Runtime) -> None:
    """The control, from scratch: models/control, metrics and curves."""
    shards, tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    at = config.at
    shape = ModelShape(
        n_vocab=tokenizer.n_vocab,
        padded_vocab=-(-tokenizer.n_vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        **asdict(at.model),
    )
    model = StudentLM(shape, seed=config.seed)
    windows = None
    if at.pretrain.windows == "uncached":
        windows = uncached_windows(shards, at.batch.seq_len, at.teacher.windows)
    batches = Batches(shards, at.batch, config.seed, windows)
    plan = Plan("control", at.pretrain.tokens // at.batch.batch_tokens, 0, at.pretrain)
    _run(
        model,
        batches,
        cross_entropy(shape.n_vocab, at.pretrain.z_loss),
        plan,
        CROSS_ENTROPY,
        config,
        runtime,
        tokenizer,
        {},
    )


def continue_control(config: Config, runtime: Runtime) -> None:
    """The matched control: cross-entropy on the cached windows, everything else as in `distill`."""
    _continue("continued", config, runtime, None)


def distill(config: Config, runtime: Runtime) -> None:
    """The student: (1 - alpha) CE + alpha D on the cached windows."""
    shards = TokenShards(SHARDS, "train")
    windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    _continue("student", config, runtime, TeacherCache(CACHE, cache_identity(config, shards), windows))


def _continue(arm: str, config: Config, runtime: Runtime, cache: TeacherCache | None) -> None:
    at, settings = config.at, config.at.continuation
    shards, tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    model = load_student(MODELS / "control")
    if model.n_vocab != tokenizer.n_vocab:
        raise UserError(
            f"models/control has {model.n_vocab} tokens, data/shards {tokenizer.n_vocab}; "
            "make it again with: dvc repro pretrain"
        )
    windows = cached_windows(shards, at.batch.seq_len, at.teacher.windows)
    batches = Batches(shards, at.batch, config.seed, windows)
    steps = settings.epochs * len(batches.windows) // at.batch.rows
    plan = Plan(arm, steps, at.pretrain.tokens // at.batch.batch_tokens, settings)
    inputs: dict[str, object] = {"control": sha256_file(MODELS / "control" / WEIGHTS)}
    said = CROSS_ENTROPY
    if cache is None:
        loss = cross_entropy(model.n_vocab, settings.z_loss)
    else:
        objective = Objective(config.alpha, config.objective, config.temperature, settings.z_loss)
        loss = distillation(model.n_vocab, objective, cache)
        mixed = f"{1 - config.alpha:g} {CROSS_ENTROPY} + {config.alpha:g} {config.objective}"
        said = f"{mixed}, at temperature {config.temperature:g}"
        inputs |= {"objective": asdict(objective), "cache": sha256_file(CACHE / cache_module.MANIFEST)}
    _run(model, batches, loss, plan, said, config, runtime, tokenizer, inputs)


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
    model.set_activation_dtype(runtime.dtype).to(runtime.device)
    if runtime.compiled:
        model.compile_blocks()
    optimizers = Optimizers(model, plan.optimization)
    if getattr(plan.optimization, "optimizer_state", "reset") == "keep":
        _load_moments(optimizers, MODELS / "control" / OPTIMIZER)
    banner(f"{plan.arm}: {model.parameter_count():,} parameters", describe(model, batches, plan, said, runtime))
    evaluator = Evaluator.build(batches.shards, SHARDS, tokenizer, config.at.batch, plan.optimization, model.context)
    inputs |= {
        "plan": asdict(plan),
        "batch": asdict(config.at.batch),
        "shape": asdict(model.shape),
        "seed": config.seed,
        "runtime": [str(runtime.device), str(runtime.dtype), runtime.compiled, runtime.threads],
        "corpus": [batches.shards.digest, evaluator.validation.digest, tokenizer.fingerprint],
        "code": code_digest(*CODE),
    }
    began = time.perf_counter()
    with scratch(plan.arm, inputs) as directory:
        history = train(model, batches, loss, plan, optimizers, evaluator, directory)
        moments = optimizers.state_tensors() if plan.arm == "control" else None
        save_student(model, tokenizer, MODELS / plan.arm, moments)
        history.write(plan.arm, PLOTS, METRICS)
        last, hellaswag = history.loss[-1], history.hellaswag[-1]
        write_json(
            METRICS / f"{plan.arm}.json",
            {
                "arm": plan.arm,
                "parameters": model.parameter_count(),
                "steps": plan.steps,
                "tokens": plan.steps * config.at.batch.batch_tokens,
                "epochs": round(plan.steps * config.at.batch.rows / len(batches.windows), 3),
                "train_loss": last["train_loss"],
                "val_loss": last["val_loss"],
                "val_bpb": last["val_bpb"],
                "hellaswag_acc_norm": hellaswag["acc_norm"],
                "tokens_per_s": round(history.trained_tokens / max(history.elapsed_s, 1e-9), 1),
                "elapsed_s": round(time.perf_counter() - began, 1),
                "peak_memory_bytes": peak_memory_bytes(),
            },
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
    parts = batch.batch_tokens // (batch.micro_batch_rows * batch.seq_len)
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
