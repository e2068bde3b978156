"""params.yaml -> frozen dataclasses. Every type, range and unknown key is checked here, at the door.

The file is read as YAML 1.2, as DVC reads and writes it: DVC writes `-S learning_rate=1e-5` as `1e-05`, which a
YAML 1.1 reader such as PyYAML takes for a string.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from microlm.errors import ParameterError, UserError
from microlm.files import read_yaml
from microlm.parameters import NOTEBOOK_TEMPERATURE, ReferenceConfig, RuntimeConfig, ScaleConfig
from microlm.schema import parse, positive, shown, within

PARAMS = Path("params.yaml")
OVERRIDES = "fresh"  # the block of `start` that holds what a start in the student's own shape changes
# the blocks that it changes, and what of each stays
FIXED = {"batch": ("seq_len",)} | dict.fromkeys(("pretrain", "continuation"), ("validation_windows", "hellaswag_items"))


class ConfigError(UserError, ValueError):
    """All that is wrong in params.yaml, a line each."""


@dataclass(frozen=True)
class Config:
    """params.yaml with `scales.<scale>` chosen as `at`."""

    scale: str
    seed: int = within(0, 2**63 - 1)
    start: Literal["auto", "fresh", "embedding", "pruned"] = field()
    init: Literal["control", "scratch"] = field()
    objective: Literal["rkl", "fkl", "jsd", "skew_rkl", "skew_fkl", "tvd", "notebook", "minillm"] = field()
    alpha: float = within(0, 1)
    alpha_schedule: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = field()
    alpha_final: float = within(0, 1)
    temperature: float = positive()
    beta: float = within(0, 1, low_open=True, high_open=True)
    skew: float = within(0, 1, low_open=True, high_open=True)
    tail: Literal["lumped", "capped", "table"] = field()
    log: list[Literal["csv", "tensorboard"]] = field()
    references: list[ReferenceConfig] = field()
    at: ScaleConfig = field()

    @property
    def start_kind(self) -> str:
        """`start`, or where it is auto the scale's own."""
        return self.at.start.default if self.start == "auto" else self.start

    @property
    def continuation_runtime(self) -> RuntimeConfig:
        """`runtime` with the dtype that `continuation` may ask for."""
        dtype = self.at.continuation.dtype
        return self.at.runtime if dtype == "auto" else replace(self.at.runtime, dtype=dtype)

    @property
    def distills(self) -> bool:
        """Whether the distillation term has a weight at all."""
        later = self.alpha_schedule != "constant" and self.alpha_final > 0
        return self.objective == "notebook" or self.alpha > 0 or later

    @contextmanager
    def naming_keys(self) -> Iterator[None]:
        """A room below sees its own block, and names a key as it is called there: file and scale are added here."""
        try:
            yield
        except ParameterError as error:
            lines = (f"{PARAMS}: scales.{self.scale}.{line}" for line in str(error).splitlines())
            raise UserError("\n".join(lines)) from None

    def problems(self) -> Iterator[str]:
        if "csv" not in self.log:
            yield "log: lacks csv, of which plots and figures are made; write [csv] or [csv, tensorboard]"
        elif len(set(self.log)) < len(self.log):
            yield "log: each may be named once"
        if self.at is None:
            return
        captured, windows = self.at.teacher.temperatures, f"scales.{self.scale}.continuation.windows"
        mend = f"add it to scales.{self.scale}.teacher.temperatures"
        if self.objective == "notebook" and NOTEBOOK_TEMPERATURE not in captured:
            yield f"objective: notebook reads the cache at temperature {NOTEBOOK_TEMPERATURE:g}; {mend}"
        if self.temperature not in captured:
            yield f"temperature: {self.temperature:g} is not captured; choose one of {captured} or {mend}"
        if self.objective == "minillm" and self.temperature != 1:
            yield f"temperature: minillm samples at 1, not at {self.temperature:g}; set temperature=1"
        if self.at.continuation.windows == "difference" and self.at.teacher.source == "live":
            yield (
                f"{windows}: difference ranks windows by the teacher's cache, and teacher.source: live writes none; "
                "choose cached, random or any, or set source: cache"
            )
        labelled = self.at.teacher.source == "cache" and self.objective != "minillm"
        if self.at.continuation.windows == "any" and self.distills and labelled:
            yield (
                f"{windows}: any includes windows that the teacher has not labelled; set alpha=0 with it, or choose "
                "cached, difference or random"
            )


def load_config(path: str | Path = PARAMS, **instead: str) -> Config:
    """Read and check the whole file: every scale, not just the chosen one.

    Args:
        instead: top-level values in place of the file's, e.g. another scale.

    Raises:
        ConfigError: one line for each thing that is wrong, naming file, key and mend.
    """
    try:
        raw = read_yaml(Path(path), "run from the top folder of the repository", "scale: laptop") | instead
    except UserError as error:
        raise ConfigError(str(error)) from None
    return config_of(raw, path)


def config_of(raw: dict[str, Any], path: str | Path) -> Config:
    """`load_config` of what the file `path` holds, or would hold."""
    raw, found = dict(raw), []
    scales = raw.pop("scales", None)
    if not isinstance(scales, dict) or not scales:
        raise ConfigError(f"{path}: scales: must hold one block for each scale, e.g. laptop")
    odd = [shown(name) for name in scales if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"{path}: scales: {odd[0]} is not a name of a scale; write a text, e.g. laptop")
    blocks = {name: _parse_scale(name, block, found) for name, block in scales.items()}
    name, kind = raw.get("scale"), raw.get("start")
    known = isinstance(name, str) and name in blocks
    if not known:
        found.append(f"scale: {shown(name)} is not a scale; choose one of {', '.join(blocks)}")
    pruned, own = blocks[name] if known else (None, None)
    if kind == "auto" and pruned is not None:
        kind = pruned.start.default
    config = parse(Config, raw | {"at": pruned if kind == "pruned" else own}, "", found)
    if found:
        raise ConfigError("\n".join(f"{path}: {line}" for line in found))
    return config


def _parse_scale(name: str, block: Any, found: list[str]) -> tuple[ScaleConfig | None, ScaleConfig | None]:
    """The scale as it stands, and as a start in the student's own shape (`start.fresh`) changes it."""
    start = block.get("start") if isinstance(block, dict) else None
    if not isinstance(start, dict):
        return (parse(ScaleConfig, block, f"scales.{name}.", found),) * 2
    where, changes = f"scales.{name}.start.{OVERRIDES}.", start.get(OVERRIDES)
    block = {**block, "start": {key: value for key, value in start.items() if key != OVERRIDES}}
    before = len(found)
    pruned = parse(ScaleConfig, block, f"scales.{name}.", found)
    if not isinstance(changes, dict) or not all(isinstance(change, dict) for change in changes.values()):
        found.append(f"{where.rstrip('.')}: must hold blocks of keys and values, or {{}}, not {shown(changes)}")
        return pruned, None
    for key in changes:
        if key not in FIXED:
            found.append(f"{where}{shown(key)}: unknown block; known here: {', '.join(FIXED)}")
    for key, change in changes.items():
        for fixed in FIXED.get(key, ()):  # one cache and one set of questions serve every start
            if fixed in change:
                found.append(f"{where}{key}.{fixed}: is the same for every start; remove it here")
    if len(found) > before:  # what is wrong in both is said once
        return pruned, None
    changed = {key: {**block[key], **change} for key, change in changes.items()}
    return pruned, parse(ScaleConfig, block | changed, where, found)
