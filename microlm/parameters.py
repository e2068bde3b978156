"""The blocks of one scale in params.yaml as frozen dataclasses; config.py reads them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from microlm.schema import count, positive, within

NOTEBOOK_TEMPERATURE = 2.5  # of the published loss, whatever `temperature` says


@dataclass(frozen=True)
class RuntimeConfig:
    """How the arithmetic is done. It changes results in the last digits, so the trainings track it."""

    dtype: Literal["auto", "bfloat16", "float32"]
    compile: Literal["auto", "off"]
    threads: Literal["auto"] | int = within(1, 4096)


@dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from and how it becomes shards."""

    source: Literal["packaged", "files", "hub"]
    tokenizer: str
    validation_fraction: float = within(0, 1, low_open=True, high_open=True)
    train_tokens: int | None = count()
    shard_tokens: int = within(1024, 2**40)
    text_column: str = "text"
    paths: list[str] | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None
    empty: Literal["refuse", "skip"] | None = None  # rows without text; null: skip for hub, else refuse

    @property
    def spares_empty(self) -> bool:
        return self.empty == "skip" or (self.empty is None and self.source == "hub")

    def problems(self) -> Iterator[str]:
        if self.source == "files" and not self.paths:
            yield "paths: source is files, so name at least one file or glob, e.g. [texts/*.jsonl]"
        if self.source == "hub" and not (self.dataset and self.revision):
            yield "revision: source is hub, so name dataset and revision (the full commit hash), or the text may change"


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the student."""

    layers: int = count()
    hidden_size: int = count()
    heads: int = count()
    head_dim: int = within(2, 4096)
    intermediate_size: int = count()
    context: int = count()
    rope_theta: float = positive()

    def problems(self) -> Iterator[str]:
        if self.head_dim % 2:
            yield f"head_dim: rotary positions turn pairs, so {self.head_dim} must be even"


@dataclass(frozen=True)
class StartConfig:
    """What the control starts from where the top-level `start` is auto, and how a pruned start is cut.

    Of each width and of the layers null keeps all that the teacher has. `layers` is how many, chosen by `choose`, or
    which. The block also holds `fresh`: what a start in the student's own shape, fresh or embedding, changes in
    batch, pretrain and continuation (config.py).
    """

    default: Literal["fresh", "embedding", "pruned"]
    layers: int | list[int] | None = within(0, 2**20)
    choose: Literal["influence", "loss"] = field()
    hidden_size: int | None = count()
    heads: int | None = count()
    intermediate_size: int | None = count()
    calibration_windows: int = count()

    def problems(self) -> Iterator[str]:
        if self.layers == 0:
            yield "layers: 0 leaves no layer; keep at least 1"


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step, the same in every training."""

    seq_len: int = within(2, 2**20)
    batch_tokens: int = count()
    micro_batch_rows: int = count()

    def problems(self) -> Iterator[str]:
        micro = self.micro_batch_rows * self.seq_len
        if self.batch_tokens % micro:
            yield f"batch_tokens: {self.batch_tokens} is not a multiple of micro_batch_rows*seq_len={micro}"

    @property
    def rows(self) -> int:
        return self.batch_tokens // self.seq_len

    @property
    def micro_batches(self) -> int:
        """Forward passes of one step: as many processes can share it."""
        return self.rows // self.micro_batch_rows


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimizer, schedule and evaluation cadence of one training."""

    optimizer: Literal["muon", "adamw"]
    muon_learning_rate: float = positive()
    learning_rate: float = positive()
    weight_decay: float = within(0, 10)
    schedule: Literal["warmup_stable_decay", "cosine"] = field()
    warmup_fraction: float = within(0, 1)
    decay_fraction: float = within(0, 1)
    final_fraction: float = within(0, 1)
    clip_norm: float = positive()
    z_loss: float = within(0, 1)
    average: Literal["none", "ema"] = field()
    average_decay: float = within(0, 1, high_open=True)
    evaluate_every: int = count()
    validation_windows: int = count()
    hellaswag_items: int = within(4, 10042)

    def problems(self) -> Iterator[str]:
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1:
            yield "decay_fraction: warmup_fraction + decay_fraction is more than 1"


@dataclass(frozen=True)
class PretrainConfig(OptimizationConfig):
    """`windows: uncached` leaves the teacher's windows to the continuations, to which they are then new text."""

    tokens: int = count()
    windows: Literal["uncached", "all"] = field()


@dataclass(frozen=True)
class ContinuationConfig(OptimizationConfig):
    """Shared by `continue` and `distill`: the loss alone differs between them.

    `windows` chooses what both train on, always for `epochs` times the tokens of the cached windows: all of these, the
    share `select_fraction` of them that difference sampling or chance picks, or any window of the training text.
    `student_...` are the rates of `distill` where they are not null and there is a distillation term.
    """

    epochs: int = count()
    windows: Literal["cached", "difference", "random", "any"] = field()
    select_fraction: float = within(0, 1, low_open=True)
    dtype: Literal["auto", "bfloat16", "float32"] = field()
    optimizer_state: Literal["reset", "keep"] = field()
    student_learning_rate: float | None = positive()
    student_muon_learning_rate: float | None = positive()

    def of_student(self) -> "ContinuationConfig":
        """For a loss with a distillation term, whose best rates need not be those of cross-entropy."""
        return replace(
            self,
            learning_rate=self.student_learning_rate or self.learning_rate,
            muon_learning_rate=self.student_muon_learning_rate or self.muon_learning_rate,
        )


@dataclass(frozen=True)
class TeacherConfig:
    """`source: live` runs the teacher in every step and writes no cache; `record` is how what it says is rounded."""

    model: str
    revision: str | None
    source: Literal["cache", "live"]
    record: Literal["full", "compact"]
    top_k: int = within(1, 65536)
    temperatures: list[float] = positive()
    windows: int = count()
    batch_rows: int = count()

    def problems(self) -> Iterator[str]:
        if 1.0 not in self.temperatures:
            yield "temperatures: 1.0 must be among them, the log-probabilities are stored at it"
        elif len(set(self.temperatures)) < len(self.temperatures):
            yield "temperatures: each may be named once"


@dataclass(frozen=True)
class OnPolicyConfig:
    """What `objective: minillm` samples for each micro-batch (Gu et al. 2024, arXiv:2306.08543)."""

    prompts: int = count()
    prompt_tokens: int = count()
    response_tokens: int = within(2, 2**20)
    teacher_mix: float = within(0, 1, high_open=True)
    clip: float = positive()


@dataclass(frozen=True)
class ProbeConfig:
    """How much validation text the probe of cache layouts reads with the teacher's full logits."""

    windows: int = count()


@dataclass(frozen=True)
class BenchmarkConfig:
    """Tasks that every model of the pipeline is scored on; `items` of each, a fixed subset, or all."""

    tasks: list[str]
    protocol: str | None  # the task's own where null
    shots: int = within(0, 64)
    items: int | None = within(4, 2**31)


@dataclass(frozen=True)
class HubText:
    """A dataset of texts on the hub, at a full commit hash."""

    dataset: str
    revision: str
    subset: str | None = None
    text_column: str = "text"


@dataclass(frozen=True)
class EvaluationConfig:
    """`data` is a folder with tasks' files in their published formats; `hub`: whether to ask it for what is missing.

    `outside` is text of another kind than the corpus: packaged, files (globs) or a dataset; None does without. Of it
    and of the validation text stage `evaluate` scores `windows`, evenly spaced; None takes all.
    """

    batch_tokens: int = count()
    bootstrap_draws: int = within(100, 10**7)
    windows: int | None = within(2, 2**31)  # two: one gives no interval
    outside: Literal["packaged"] | list[str] | HubText | None = field()
    benchmarks: list[BenchmarkConfig] = field()
    data: str | None = field()
    hub: bool = field()


@dataclass(frozen=True)
class ReferenceConfig:
    """A model of others, scored by `microlm references`. Without a revision, the one found is in the result."""

    model: str
    revision: str | None


@dataclass(frozen=True)
class ScaleConfig:
    """One block of `scales`."""

    runtime: RuntimeConfig
    corpus: CorpusConfig
    start: StartConfig
    model: ModelConfig
    batch: BatchConfig
    pretrain: PretrainConfig
    teacher: TeacherConfig
    continuation: ContinuationConfig
    on_policy: OnPolicyConfig
    probe: ProbeConfig
    evaluation: EvaluationConfig

    def problems(self) -> Iterator[str]:
        batch, tokens, epochs, sampled = self.batch, self.pretrain.tokens, self.continuation.epochs, self.on_policy
        if batch.seq_len > self.model.context:
            yield f"batch.seq_len: {batch.seq_len} is more than model.context={self.model.context}"
        if tokens < batch.batch_tokens:
            yield f"pretrain.tokens: {tokens} is less than one step, batch.batch_tokens={batch.batch_tokens}"
        if epochs * self.teacher.windows < batch.rows:
            yield f"teacher.windows: {epochs} epochs of them do not fill one step of {batch.rows} windows"
        if sampled.prompts > batch.micro_batch_rows:
            yield f"on_policy.prompts: {sampled.prompts} is more than batch.micro_batch_rows"
        if sampled.prompt_tokens > batch.seq_len:
            yield f"on_policy.prompt_tokens: {sampled.prompt_tokens} is more than batch.seq_len"
        if sampled.prompt_tokens + sampled.response_tokens > self.model.context:
            yield "on_policy.response_tokens: with prompt_tokens they are more than model.context; lower one"
