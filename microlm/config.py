"""params.yaml -> frozen dataclasses. Every type, range and unknown key is checked here, at the door.

The file is read as YAML 1.2, as DVC reads and writes it: DVC writes `-S learning_rate=1e-5` as `1e-05`, which a
YAML 1.1 reader such as PyYAML takes for a string.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from microlm.errors import UserError
from microlm.files import read_yaml
from microlm.schema import count, parse, positive, shown, within

PARAMS = Path("params.yaml")
NOTEBOOK_TEMPERATURE = 2.5


class ConfigError(UserError, ValueError):
    """All that is wrong in params.yaml, a line each."""


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

    def problems(self) -> list[str]:
        if self.source == "files" and not self.paths:
            return ["paths: source is files, so name at least one file or glob, e.g. [texts/*.jsonl]"]
        if self.source == "hub" and not (self.dataset and self.revision):
            return [
                "revision: source is hub, so name dataset and revision (the full commit hash), or the text may change"
            ]
        return []


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

    def problems(self) -> list[str]:
        return [f"head_dim: rotary positions turn pairs, so {self.head_dim} must be even"] if self.head_dim % 2 else []


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step, the same in every arm."""

    seq_len: int = within(2, 2**20)
    batch_tokens: int = count()
    micro_batch_rows: int = count()

    def problems(self) -> list[str]:
        micro = self.micro_batch_rows * self.seq_len
        if self.batch_tokens % micro:
            return [f"batch_tokens: {self.batch_tokens} is not a multiple of micro_batch_rows*seq_len={micro}"]
        return []

    @property
    def rows(self) -> int:
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True)
class OptimizationConfig:
    """Optimizer, schedule and evaluation cadence of one training."""

    optimizer: Literal["muon", "adamw"]
    muon_learning_rate: float = positive()
    learning_rate: float = positive()
    weight_decay: float = within(0, 1)
    schedule: Literal["warmup_stable_decay", "cosine"] = field()
    warmup_fraction: float = within(0, 1)
    decay_fraction: float = within(0, 1)
    final_fraction: float = within(0, 1)
    clip_norm: float = positive()
    z_loss: float = within(0, 1)
    evaluate_every: int = count()
    validation_windows: int = count()
    hellaswag_items: int = within(4, 10042)

    def problems(self) -> list[str]:
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1:
            return ["decay_fraction: warmup_fraction + decay_fraction is more than 1"]
        return []


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
    """

    epochs: int = count()
    windows: Literal["cached", "difference", "random", "any"] = field()
    select_fraction: float = within(0, 1, low_open=True)
    dtype: Literal["auto", "bfloat16", "float32"] = field()
    optimizer_state: Literal["reset", "keep"] = field()


@dataclass(frozen=True)
class TeacherConfig:
    model: str
    revision: str | None
    top_k: int = within(1, 65536)
    temperatures: list[float] = positive()
    windows: int = count()
    batch_rows: int = count()

    def problems(self) -> list[str]:
        if 1.0 not in self.temperatures:
            return ["temperatures: 1.0 must be among them, the log-probabilities are stored at it"]
        if len(set(self.temperatures)) < len(self.temperatures):
            return ["temperatures: each may be named once"]
        return []


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
class EvaluationConfig:
    """`data` is a folder with tasks' files in their published formats; `hub`: whether to ask it for what is missing."""

    batch_tokens: int = count()
    bootstrap_draws: int = within(100, 10**7)
    benchmarks: list[BenchmarkConfig]
    data: str | None
    hub: bool


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
    model: ModelConfig
    batch: BatchConfig
    pretrain: PretrainConfig
    teacher: TeacherConfig
    continuation: ContinuationConfig
    on_policy: OnPolicyConfig
    probe: ProbeConfig
    evaluation: EvaluationConfig

    def problems(self) -> list[str]:
        found = []
        step, epochs = self.batch.batch_tokens, self.continuation.epochs
        if self.batch.seq_len > self.model.context:
            found.append(f"batch.seq_len: {self.batch.seq_len} is more than model.context={self.model.context}")
        if self.pretrain.tokens < step:
            found.append(f"pretrain.tokens: {self.pretrain.tokens} is less than one step, batch.batch_tokens={step}")
        if epochs * self.teacher.windows < self.batch.rows:
            found.append(f"teacher.windows: {epochs} epochs of them do not fill one step of {self.batch.rows} windows")
        sampled = self.on_policy
        if sampled.prompts > self.batch.micro_batch_rows:
            found.append(f"on_policy.prompts: {sampled.prompts} is more than batch.micro_batch_rows")
        if sampled.prompt_tokens > self.batch.seq_len:
            found.append(f"on_policy.prompt_tokens: {sampled.prompt_tokens} is more than batch.seq_len")
        if sampled.prompt_tokens + sampled.response_tokens > self.model.context:
            found.append("on_policy.response_tokens: with prompt_tokens they are more than model.context; lower one")
        return found


@dataclass(frozen=True)
class Config:
    """params.yaml with `scales.<scale>` chosen as `at`."""

    scale: str
    seed: int = within(0, 2**63 - 1)
    init: Literal["control", "scratch"] = field()
    objective: Literal["rkl", "fkl", "jsd", "skew_rkl", "skew_fkl", "tvd", "notebook", "minillm"] = field()
    alpha: float = within(0, 1)
    alpha_schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = field()
    alpha_final: float = within(0, 1)
    temperature: float = positive()
    beta: float = within(0, 1, low_open=True, high_open=True)
    skew: float = within(0, 1, low_open=True, high_open=True)
    tail: Literal["lumped", "capped", "table"] = field()
    references: list[ReferenceConfig] = field()
    at: ScaleConfig = field()

    @property
    def continuation_runtime(self) -> RuntimeConfig:
        """`runtime` with the dtype that `continuation` may ask for."""
        dtype = self.at.continuation.dtype
        return self.at.runtime if dtype == "auto" else replace(self.at.runtime, dtype=dtype)

    @property
    def distills(self) -> bool:
        """Whether the distillation term has a weight at all."""
        return self.objective == "notebook" or self.largest_alpha > 0

    @property
    def largest_alpha(self) -> float:
        return self.alpha if self.alpha_schedule == "constant" else max(self.alpha, self.alpha_final)

    def problems(self) -> list[str]:
        if self.at is None:
            return []
        found, captured = [], self.at.teacher.temperatures
        mend = f"add it to scales.{self.scale}.teacher.temperatures"
        if self.objective == "notebook" and NOTEBOOK_TEMPERATURE not in captured:
            found.append(f"objective: notebook reads the cache at temperature {NOTEBOOK_TEMPERATURE:g}; {mend}")
        if self.temperature not in captured:
            found.append(f"temperature: {self.temperature:g} is not captured; choose one of {captured} or {mend}")
        if self.objective == "minillm" and self.temperature != 1:
            found.append(f"temperature: minillm samples at 1, not at {self.temperature:g}; set temperature=1")
        if self.at.continuation.windows == "any" and self.distills and self.objective != "minillm":
            found.append(
                f"scales.{self.scale}.continuation.windows: any includes windows that the teacher has not labelled; "
                "set alpha=0 with it, or choose cached, difference or random"
            )
        return found


def load_config(path: str | Path = PARAMS) -> Config:
    """Read and check the whole file: every scale, not just the chosen one.

    Raises:
        ConfigError: one line for each thing that is wrong, naming file, key and mend.
    """
    raw = _read_yaml(Path(path))
    found: list[str] = []
    scales = raw.pop("scales", None)
    if not isinstance(scales, dict) or not scales:
        raise ConfigError(f"{path}: scales: must hold one block for each scale, e.g. laptop")
    odd = [shown(name) for name in scales if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"{path}: scales: {odd[0]} is not a name of a scale; write a text, e.g. laptop")
    blocks = {name: parse(ScaleConfig, block, f"scales.{name}.", found) for name, block in scales.items()}
    name = raw.get("scale")
    if not isinstance(name, str) or name not in blocks:
        found.append(f"scale: {shown(name)} is not a scale; choose one of {', '.join(map(str, blocks))}")
        raw["at"] = None
    else:
        raw["at"] = blocks[name]
    config = parse(Config, raw, "", found)
    if config is None or found:
        raise ConfigError("\n".join(f"{path}: {line}" for line in found))
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path, "run from the top folder of the repository", "scale: laptop")
    except UserError as error:
        raise ConfigError(str(error)) from None
