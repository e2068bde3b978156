"""The trainings: control, continued and student. The loss alone differs between the last two."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from microlm.config import Config, load_config
from microlm.corpus.batches import Batches, cached_windows, evenly_spaced, uncached_windows
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import ParameterError, UserError
from microlm.evaluation.results.answers import answers, curve_figures
from microlm.evaluation.scoring.encoding import Encoded, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.scoring.held_out_loss import ValidationLoss, held_out, loss_on
from microlm.evaluation.tasks.data import read_rows
from microlm.evaluation.tasks.prompts import questions, stratified_subset
from microlm.evaluation.tasks.task import task_named
from microlm.files import sha256_bytes, sha256_file, write_json
from microlm.models.interface import LanguageModel
from microlm.models.model_files import OPTIMIZER, WEIGHTS, load_student, save_student
from microlm.models.student import StudentLM
from microlm.models.teacher_source import teacher_source
from microlm.objective.on_policy import MiniLLM
from microlm.parameters import BatchConfig
from microlm.pipeline.asked_objective import objective_schedule
from microlm.pipeline.select import chosen_windows
from microlm.runtime import distributed
from microlm.runtime.device import Runtime, peak_memory_bytes
from microlm.runtime.launcher import PROCESSES
from microlm.runtime.paths import CACHE, CONTROL, METRICS, MODELS, PLOTS, SHARDS, START, TRAINED_MODELS
from microlm.runtime.resume import resumable, stage_code
from microlm.runtime.terminal import banner
from microlm.teacher.cache import MANIFEST, CacheIdentity, TeacherCache, cache_identity
from microlm.teacher.recorders import LiveTeacher, load_fitting_teacher, load_recorder
from microlm.training import losses
from microlm.training.history import Evaluation, History
from microlm.training.live_curves import live_curves, refuse_absent
from microlm.training.loop import Loss, Plan, train
from microlm.training.optimizer import Optimizers

TASK, PROTOCOL = "hellaswag", "completion"  # of the curves
DISTANCE_WINDOWS = 16


def pretrain(config: Config, runtime: Runtime) -> None:
    """The control, from scratch: models/control, metrics and curves."""
    at, shards, windows = config.at, TokenShards(SHARDS, "train"), None
    if at.pretrain.windows == "uncached":
        windows = uncached_windows(shards, at.batch.seq_len, at.teacher.windows)
    batches = Batches(shards, at.batch, config.seed, windows)
    Training(config, START, batches, Plan("control", _control_steps(config), 0, at.pretrain)).run(runtime)


def continue_control(config: Config, runtime: Runtime) -> None:
    """The matched control: cross-entropy, everything else as in `distill`."""
    continuation(config, "continued").run(runtime)


def distill(config: Config, runtime: Runtime) -> None:
    """The student: (1 - alpha) CE + alpha D, D from the teacher's cache or from the teacher itself."""
    at, asked, training = config.at, objective_schedule(config), continuation(config, "student")
    n_vocab, shards, inputs = training.model.n_vocab, training.batches.shards, {"objective": asdict(asked)}
    identity = cache_identity(at.teacher, at.batch.seq_len, shards)
    if config.objective == "minillm":
        sampled = _sampled_teacher(config, identity, runtime)
        loss = losses.on_policy(n_vocab, asked, MiniLLM(training.model, sampled, at.on_policy, config.seed))
        inputs |= {"on_policy": asdict(at.on_policy), "teacher": teacher_source(at.teacher).fingerprint(sampled)}
    else:
        teacher = cache = TeacherCache(CACHE, identity, cached_windows(shards, identity.seq_len, at.teacher.windows))
        if identity.source == "live" and config.distills:
            as_captured = replace(runtime, dtype=cache.dtype)
            with config.naming_keys():
                record = load_recorder(teacher_source(at.teacher), cache.identity, as_captured, training.tokenizer)
            teacher = LiveTeacher(record, cache.tables)
        loss = losses.Distillation(n_vocab, asked, teacher)
        if identity.source == "cache" or config.distills:
            training.measure_distance(teacher, runtime)
        inputs |= {"cache": sha256_file(CACHE / MANIFEST)}
    training.run(runtime, loss, asked.describe(), **inputs)


def _sampled_teacher(config: Config, identity: CacheIdentity, runtime: Runtime) -> LanguageModel:
    with config.naming_keys():
        try:
            return load_fitting_teacher(teacher_source(config.at.teacher), identity, runtime)
        except ParameterError:
            raise
        except UserError as error:
            raise UserError(
                f"{error}. objective: minillm samples from the teacher in every step, which its cache cannot serve"
            ) from None


def continuation(config: Config, name: str) -> "Training":
    """`continue` and `distill` but for the loss: from the same weights, over the same windows, for as many steps."""
    at, shards = config.at, TokenShards(SHARDS, "train")
    start, first_step, rates = CONTROL, _control_steps(config), at.continuation
    if config.init == "scratch":
        start, first_step, rates = START, 0, at.pretrain
    elif name == "student" and config.distills:
        rates = rates.of_student()
    labelled = len(cached_windows(shards, at.batch.seq_len, at.teacher.windows))
    plan = Plan(name, at.continuation.epochs * labelled // at.batch.rows, first_step, rates)
    return Training(config, start, Batches(shards, at.batch, config.seed, chosen_windows(config, shards)), plan)


def _control_steps(config: Config) -> int:
    return config.at.pretrain.tokens // config.at.batch.batch_tokens


class Training:
    """A training but for its loss, from the weights in the folder `start`."""

    def __init__(self, config: Config, start: Path, batches: Batches, plan: Plan) -> None:
        self.config, self.start, self.batches, self.plan = config, start, batches, plan
        self.told: dict[str, float] = {}  # for the metrics, beside what every training tells
        self.tokenizer, self.model = load_tokenizer(SHARDS / "tokenizer"), load_student(start)
        if self.model.n_vocab != self.tokenizer.n_vocab:
            raise UserError(
                f"{start} has {self.model.n_vocab} tokens, data/shards {self.tokenizer.n_vocab}; make it again with: "
                f"dvc repro {TRAINED_MODELS.get(start.name, start.name)}"
            )

    def measure_distance(self, teacher: TeacherCache | LiveTeacher, runtime: Runtime) -> None:
        """How far the start is from its teacher, on windows that the teacher labelled."""
        shards, identity = self.batches.shards, teacher.identity
        labelled = cached_windows(shards, identity.seq_len, identity.windows)
        chosen = labelled[evenly_spaced(len(labelled), DISTANCE_WINDOWS)]
        model = self.model.set_activation_dtype(runtime.dtype).to(runtime.device)
        found = losses.distances(model, teacher, shards, chosen, self.batches.config.micro_batch_rows)
        self.told |= {f"start_{name}": round(value, 6) for name, value in found.items()}

    def run(self, runtime: Runtime, loss: Loss | None = None, said: str = "cross-entropy", **inputs: object) -> None:
        """Train, then write the model, the curves, the log and the metrics.

        Args:
            loss: cross-entropy where none is given; `said` is what the banner has of it.
            inputs: as JSON, what the result depends on beside what every training does.
        """
        config, plan, model, batches, tokenizer = self.config, self.plan, self.model, self.batches, self.tokenizer
        self._refuse_idle_processes()
        refuse_absent(config.log)
        model.set_activation_dtype(runtime.dtype).to(runtime.device)
        if runtime.compiled:
            model.compile_blocks()
        rates, texts = plan.optimization, held_out(config.at)
        optimizers = Optimizers(model, rates)
        if getattr(rates, "optimizer_state", "reset") == "keep":
            _load_moments(optimizers, CONTROL / OPTIMIZER)
        banner(f"{plan.name}: {model.parameter_count():,} parameters", [*runtime.lines(), *self._choices(said)])
        evaluator = Evaluator(
            *(batches.shards, texts["val"], tokenizer.byte_lengths),
            asked_questions(rates.hellaswag_items, tokenizer, model.context),
            *(batches.config, rates.validation_windows, texts.get("outside")),
        )
        inputs |= {
            "plan": asdict(plan),
            "start": sha256_file(self.start / WEIGHTS),
            "windows": sha256_bytes(batches.windows.tobytes()),
            "batch": asdict(batches.config),
            "shape": asdict(model.shape),
            "seed": config.seed,
            "runtime": runtime.decisive(),
            "corpus": [batches.shards.digest, *(text.digest for text in texts.values()), tokenizer.fingerprint],
            "code": stage_code(TRAINED_MODELS[plan.name]),
        }
        began = time.perf_counter()
        loss = loss or losses.cross_entropy(model.n_vocab, rates.z_loss)
        with resumable(plan.name, inputs) as directory:
            live = live_curves(config.log, plan.name, directory.name, plan.first_step, self._choices(said))
            with live as show:
                history = train(model, batches, loss, plan, optimizers, evaluator, directory, show)
            moments = optimizers.state_tensors() if plan.name == "control" else None
            if not distributed.is_first():
                return
            save_student(model, tokenizer, MODELS / plan.name, moments)
            history.write(plan.name, PLOTS, METRICS)
            used = {"elapsed_s": round(time.perf_counter() - began, 1), "peak_memory_bytes": peak_memory_bytes()}
            write_json(METRICS / f"{plan.name}.json", self._metrics(history) | used)

    def _metrics(self, history: History) -> dict[str, object]:
        plan, batch, last = self.plan, self.batches.config, history.loss[-1]
        return {
            "arm": plan.name,
            "parameters": self.model.parameter_count(),
            "steps": plan.steps,
            "tokens_before": plan.first_step * batch.batch_tokens,
            "tokens": plan.steps * batch.batch_tokens,
            "epochs": round(self._epochs(), 3),
            "train_loss": last["train_loss"],
            "val_loss": last["val_loss"],
            **{key: last[key] for key in ("val_bpb", "ood_bpb") if last[key] is not None},
            **self.told,
            "hellaswag_acc_norm": history.hellaswag[-1]["acc_norm"],
            "tokens_per_s": round(history.trained_tokens / max(history.elapsed_s, 1e-9), 1),
        }

    def _epochs(self) -> float:
        return self.plan.steps * self.batches.config.rows / len(self.batches.windows)

    def _choices(self, said: str) -> list[str]:
        """For the banner: the shape, the arithmetic of a step, the loss and its rates."""
        batch, plan, rates, shape = self.batches.config, self.plan, self.plan.optimization, self.model.shape
        tokens, windows, epochs = batch.batch_tokens, len(self.batches.windows), self._epochs()
        parts = f"{batch.micro_batch_rows} windows x {batch.seq_len} tokens x {batch.micro_batches} parts"
        matrices = f"{rates.muon_learning_rate:g} (matrices), " if rates.optimizer == "muon" else ""
        return [
            f"model    {shape.layers} layers, {shape.hidden_size} wide, vocabulary {shape.n_vocab:,}",
            f"step     {tokens:,} tokens = {parts}",
            f"steps    {plan.steps:,}: {plan.steps * tokens:,} tokens, {epochs:.2f} epochs of {windows:,} windows",
            f"loss     {said}",
            f"rate     {rates.optimizer}, {rates.schedule}, peak {matrices}{rates.learning_rate:g}",
        ]

    def _refuse_idle_processes(self) -> None:
        """Several processes deal a step's micro-batches among them, and each needs one."""
        batch, size = self.batches.config, distributed.size()
        if size > batch.micro_batches:
            raise UserError(
                f"{size} processes cannot share the {batch.micro_batches} micro-batches of a step (batch.batch_tokens "
                f"/ (batch.micro_batch_rows * batch.seq_len) in params.yaml); set {PROCESSES}={batch.micro_batches}, "
                f"or lower batch.micro_batch_rows to {max(1, batch.rows // size)}"
            )


def asked_questions(items: int, tokenizer: Tokenizer, context: int) -> list[Encoded]:
    """A fixed subset of `items` questions. UserError where they are not there."""
    task = task_named(TASK)
    asked = stratified_subset(questions(task, PROTOCOL, read_rows(task, None, hub=False)), items)
    return encode(asked, tokenizer, context, tokenizer.eot_id, joint=False).questions


@dataclass
class Evaluator:
    """What is measured during training: the same held-out windows and HellaSwag questions at every point of each.

    Several processes deal the batches among them, and every one gets the figures of one process, bit for bit. Blocks
    stay eager on CUDA too: compiled ones round at other places, and a curve's last point is to be what stage `evaluate`
    finds.
    """

    training: TokenShards
    validation: TokenShards
    byte_lengths: np.ndarray
    encoded: list[Encoded]
    batch: BatchConfig
    validation_windows: int
    outside: TokenShards | None = None  # text of another kind, as many windows of it

    def __call__(self, model: StudentLM, train_windows: np.ndarray | None) -> Evaluation:
        seen = self._loss(model, self.validation, self.validation_windows)
        ood_bpb = self._loss(model, self.outside, self.validation_windows).bpb if self.outside else None
        train_nats = self._loss(model, self.training, train_windows).nats if train_windows is not None else None
        return Evaluation(train_nats, seen.nats, seen.bpb, self._hellaswag(model), ood_bpb)

    def _loss(self, model: StudentLM, shards: TokenShards, windows: np.ndarray | int) -> ValidationLoss:
        seq_len, rows = self.batch.seq_len, self.batch.micro_batch_rows
        return loss_on(model, shards, self.byte_lengths, seq_len, windows, rows, together=True)

    def _hellaswag(self, model: StudentLM) -> dict[str, float]:
        batch_tokens = max(self.batch.micro_batch_rows * self.batch.seq_len, 2048)
        nats = score(model, self.encoded, batch_tokens, backend="tree", together=True)
        asked, lengths = zip(*((item.question, item.lengths) for item in self.encoded), strict=True)
        return curve_figures(answers(asked, nats, lengths, None, PROTOCOL), PROTOCOL)


def _load_moments(optimizers: Optimizers, path: Path) -> None:
    try:
        optimizers.load_state_tensors(load_file(path))
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path}: the control's optimizer state is absent or damaged ({error}); make it again with: "
            "dvc repro -f -s pretrain, or set continuation.optimizer_state: reset"
        ) from None


def most_processes() -> int:
    """Processes that a training of params.yaml has work for."""
    return load_config().at.batch.micro_batches
