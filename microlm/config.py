"""params.yaml -> frozen dataclasses. Every type, range and unknown key is checked here, at the door.

The file is read as YAML 1.2, as DVC reads and writes it: DVC writes `-S learning_rate=1e-5` as `1e-05`, which a
YAML 1.1 reader such as PyYAML takes for a string.
"""

import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from microlm.errors import UserError

PARAMS = Path("params.yaml")


class ConfigError(UserError, ValueError):
    """All that is wrong in params.yaml, a line each."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number; an open bound is excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return above and below  # False for NaN

    def __str__(self) -> str:
        low = f"{'more than' if self.low_open else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'less than' if self.high_open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "finite"


def _within(*bounds: Any, default: Any = MISSING, **more: Any) -> Any:
    return field(metadata={"range": Range(*bounds, **more)}, **({} if default is MISSING else {"default": default}))


POSITIVE = Range(0, math.inf, low_open=True, high_open=True)
COUNT = Range(1, 2**53)


def _count() -> Any:
    return field(metadata={"range": COUNT})


def _positive() -> Any:
    return field(metadata={"range": POSITIVE})


@dataclass(frozen=True)
class RuntimeConfig:
    """How the arithmetic is done. It changes results in the last digits, so the trainings track it."""

    dtype: Literal["auto", "bfloat16", "float32"]
    compile: Literal["auto", "off"]
    threads: Literal["auto"] | int = _within(1, 4096)


@dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from and how it becomes shards."""

    source: Literal["packaged", "files", "hub"]
    tokenizer: str
    validation_fraction: float = _within(0, 1, low_open=True, high_open=True)
    train_tokens: int | None = _count()
    shard_tokens: int = _within(1024, 2**40)
    text_column: str = "text"
    paths: list[str] | None = None
    dataset: str | None = None
    subset: str | None = None
    revision: str | None = None

    def problems(self) -> list[str]:
        if self.source == "files" and not self.paths:
            return ["paths: source is files, so name at least one file or glob, e.g. [texts/*.jsonl]"]
        if self.source == "hub" and not (self.dataset and self.revision):
            return ["revision: source is hub, so name dataset and revision (the full commit hash), or the text may change"]
        return []


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the student."""

    layers: int = _count()
    hidden_size: int = _count()
    heads: int = _count()
    head_dim: int = _within(2, 4096)
    intermediate_size: int = _count()
    context: int = _count()
    rope_theta: float = _positive()

    def problems(self) -> list[str]:
        return [f"head_dim: rotary positions turn pairs, so {self.head_dim} must be even"] if self.head_dim % 2 else []


@dataclass(frozen=True)
class BatchConfig:
    """One optimizer step, the same in every arm."""

    seq_len: int = _within(2, 2**20)
    batch_tokens: int = _count()
    micro_batch_rows: int = _count()

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
    muon_learning_rate: float = _positive()
    learning_rate: float = _positive()
    weight_decay: float = _within(0, 1)
    schedule: Literal["warmup_stable_decay", "cosine"] = field()
    warmup_fraction: float = _within(0, 1)
    decay_fraction: float = _within(0, 1)
    final_fraction: float = _within(0, 1)
    clip_norm: float = _positive()
    z_loss: float = _within(0, 1)
    evaluate_every: int = _count()
    validation_windows: int = _count()
    hellaswag_items: int = _within(4, 10042)

    def problems(self) -> list[str]:
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1:
            return ["decay_fraction: warmup_fraction + decay_fraction is more than 1"]
        return []


@dataclass(frozen=True)
class PretrainConfig(OptimizationConfig):
    tokens: int = _count()


@dataclass(frozen=True)
class ContinuationConfig(OptimizationConfig):
    """Shared by `continue` and `distill`: the loss alone differs between them."""

    epochs: int = _count()
    optimizer_state: Literal["reset", "keep"] = field()


@dataclass(frozen=True)
class TeacherConfig:
    model: str
    revision: str | None
    top_k: int = _within(1, 65536)
    temperatures: list[float] = _positive()
    windows: int = _count()
    batch_rows: int = _count()

    def problems(self) -> list[str]:
        if 1.0 not in self.temperatures:
            return ["temperatures: 1.0 must be among them, the log-probabilities are stored at it"]
        if len(set(self.temperatures)) < len(self.temperatures):
            return ["temperatures: each may be named once"]
        return []


@dataclass(frozen=True)
class EvaluationConfig:
    items: int = _within(4, 10042)
    batch_tokens: int = _count()
    bootstrap_draws: int = _within(100, 10**7)


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
    evaluation: EvaluationConfig

    def problems(self) -> list[str]:
        found = []
        if self.batch.seq_len > self.model.context:
            found.append(f"batch.seq_len: {self.batch.seq_len} is more than model.context={self.model.context}")
        if self.pretrain.tokens < self.batch.batch_tokens:
            found.append(f"pretrain.tokens: {self.pretrain.tokens} is less than one step, batch.batch_tokens={self.batch.batch_tokens}")
        if self.continuation.epochs * self.teacher.windows < self.batch.rows:
            found.append(f"teacher.windows: with {self.continuation.epochs} epochs they do not fill one step of {self.batch.rows} windows")
        return found


@dataclass(frozen=True)
class Config:
    """params.yaml with `scales.<scale>` chosen as `at`."""

    scale: str
    seed: int = _within(0, 2**63 - 1)
    alpha: float = _within(0, 1)
    objective: Literal["rkl", "fkl"] = field()
    temperature: float = _positive()
    at: ScaleConfig = field()

    def problems(self) -> list[str]:
        if self.at is not None and self.temperature not in self.at.teacher.temperatures:
            captured = self.at.teacher.temperatures
            return [f"temperature: {self.temperature:g} is not captured; choose one of {captured} or add it to scales.{self.scale}.teacher.temperatures"]
        return []


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
    blocks = {name: _parse(ScaleConfig, block, f"scales.{name}.", found) for name, block in scales.items()}
    name = raw.get("scale")
    if not isinstance(name, str) or name not in blocks:
        found.append(f"scale: {name!r} is not a scale; choose one of {', '.join(map(str, blocks))}")
        raw["at"] = None
    else:
        raw["at"] = blocks[name]
    config = _parse(Config, raw, "", found)
    if config is None or found:
        raise ConfigError("\n".join(f"{path}: {line}" for line in found))
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not there; run from the top folder of the repository") from None
    except (UnicodeDecodeError, YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not readable as YAML: {reason}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold keys and values, e.g. `scale: laptop`")
    return raw


def _parse(cls: type, block: Any, where: str, found: list[str]) -> Any:
    """Build `cls` from a mapping; append what is wrong to `found` and return None then."""
    if block is None and where == "":
        return None
    if not isinstance(block, dict):
        found.append(f"{where.rstrip('.')}: must be a block of keys and values, not {block!r}")
        return None
    before = len(found)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in block:
        if key not in known:
            found.append(f"{where}{key}: unknown key; known here: {', '.join(k for k in known if k != 'at')}")
    values = {}
    for key, spec in known.items():
        if key in block:
            values[key] = _convert(block[key], hints[key], spec.metadata.get("range"), where + key, found)
        elif spec.default is MISSING:
            found.append(f"{where}{key}: missing; add it")
    if len(found) > before:
        return None
    built = cls(**values)
    found.extend(where + problem for problem in getattr(built, "problems", list)())
    return built


def _convert(value: Any, hint: Any, bounds: Range | None, where: str, found: list[str]) -> Any:
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return value if isinstance(value, hint) or (value is None and where == "at") else _parse(hint, value, where + ".", found)
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        converted = _match(value, option)
        if converted is not MISSING:
            numbers = converted if isinstance(converted, list) else [converted]
            for number in numbers:
                if bounds and isinstance(number, (int, float)) and number not in bounds:
                    found.append(f"{where}: {number!r} is out of range; it must be {bounds}")
            return converted
    found.append(f"{where}: {value!r} is not {_describe(options)}{_advice(value, options)}")
    return None


def _match(value: Any, option: Any) -> Any:
    """`value` as `option`, or MISSING where it is of another type. A bool is never a number."""
    if option is type(None):
        return None if value is None else MISSING
    if typing.get_origin(option) is Literal:
        return value if isinstance(value, str) and value in typing.get_args(option) else MISSING
    if typing.get_origin(option) is list:
        items = [_match(v, typing.get_args(option)[0]) for v in value] if isinstance(value, list) and value else [MISSING]
        return MISSING if any(v is MISSING for v in items) else items
    if option is float:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 else MISSING
    if option is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else MISSING
    return value if isinstance(value, option) and value != "" else MISSING


def _describe(options: tuple[Any, ...]) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is Literal:
            names.append("one of " + ", ".join(typing.get_args(option)))
        elif typing.get_origin(option) is list:
            names.append("a list of " + {float: "numbers", str: "texts"}[typing.get_args(option)[0]])
        else:
            names.append({float: "a number", int: "a whole number", str: "a text", type(None): "null"}[option])
    return " or ".join(names)


def _advice(value: Any, options: tuple[Any, ...]) -> str:
    if isinstance(value, str) and {int, float} & set(options):
        try:
            return f"; write {float(value)!r} without quotes"
        except ValueError:
            return "; write it as digits, e.g. 0.2 or 6.0e-4" if float in options else "; write it as digits, e.g. 64"
    if isinstance(value, float) and value.is_integer() and int in options:
        return f"; write {int(value)}"
    return ""
