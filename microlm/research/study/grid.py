"""study/<name>.yaml -> runs: what each overrides in params.yaml, checked as configuration before anything is queued."""

import difflib
import functools
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microlm import files
from microlm.config import Config, config_of
from microlm.errors import UserError
from microlm.files import sha256_json

FOLDER = Path("study")
FIRST = "grid"  # the study that has STUDY.md
GRID = FOLDER / f"{FIRST}.yaml"
_GROUP_KEYS = {"about", "section", "settings", "cases", "ladder", "each"}
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf)\Z)[A-Za-z_][\w./-]*", re.I)  # a word that -S reads as itself


@dataclass(frozen=True)
class Run:
    """One point of the grid: parameters by their full key in params.yaml."""

    group: str
    label: str  # of the case, or of the ladder's rung
    slug: str
    seed: int
    settings: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """As `dvc exp run -S` takes them, in a fixed order."""
        return [f"{key}={rendered(value)}" for key, value in sorted(self.settings.items())]


@dataclass(frozen=True)
class Grid:
    name: str
    scale: str
    groups: Mapping[str, str]  # name -> what it is for
    runs: Sequence[Run]
    left_out: Mapping[str, str]  # groups of other grids that this one has not
    sections: Mapping[str, str] = field(default_factory=dict)  # where the report shows a group, if not under its name
    study: str = FIRST  # name of its file
    own_scale: str = "study"  # that of its file

    def unique(self) -> dict[str, list[Run]]:
        """Runs by the digest of what they set: what two groups share is run once and counted in both."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(sha256_json(run.overrides)[:8], []).append(run)
        return found

    def named(self, name: str) -> str:
        """A file's name, with the study and scale where they are not the first study's and its file's own."""
        stem, suffix = name.split(".")
        other = self.study * (self.study != FIRST), self.scale * (self.scale != self.own_scale)
        return "-".join((stem, *filter(None, other))) + f".{suffix}"

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.study}.yaml"

    @property
    def results(self) -> Path:
        return FOLDER / self.named("results.csv")

    @property
    def report(self) -> Path:
        """STUDY.md of the first study; a later one's lies beside its grid."""
        return Path(FOLDER if self.study != FIRST else "") / self.named("STUDY.md")

    @property
    def figure(self) -> Path:
        return FOLDER / self.named("study.png")

    @property
    def notes(self) -> Path:
        return FOLDER / ("notes.md" if self.study == FIRST else f"notes-{self.study}.md")


def rendered(value: Any) -> str:
    """A value as DVC's -S reads it (the grammar is Hydra's)."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(rendered, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{rendered(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return "'" + value.replace("'", "\\'") + "'"
    return str(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of the repository. UserError in one line where it is not one."""
    return files.read_yaml(path, f"take it from Git again: git checkout {path}", "seeds: [1, 2, 3]")


def read_grid(name: str | None, scale: str | None, params: Mapping[str, Any], path: Path = GRID) -> Grid:
    """The runs of grid `name` at a scale of params.yaml (`params`: its content); None: the file's first, its own."""
    raw = read_yaml(path)
    grids, groups, seeds = (raw.get(key) for key in ("grids", "groups", "seeds"))
    if not isinstance(grids, dict) or not isinstance(groups, dict):
        raise UserError(f"{path}: must hold `grids` (name: [group, ...]) and `groups`")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds: must be a list of whole numbers, e.g. [1, 2, 3]")
    name, own_scale = name or next(iter(grids), ""), str(raw.get("scale", Grid.own_scale))
    scale = scale or own_scale
    if name not in grids:
        raise UserError(f"{path}: {name!r} is not a grid; choose one of {', '.join(grids)}")
    if scale not in params["scales"]:
        raise UserError(f"params.yaml: {scale!r} is not a scale; choose one of {', '.join(params['scales'])}")
    for group in {group for named in grids.values() for group in named}:
        _refuse_bad_group(group, groups.get(group), path)
    runs = [run for group in grids[name] for run in _expand(group, groups[group], scale, seeds, params, path)]
    about = {group: str(body.get("about", "")) for group, body in groups.items()}
    chosen = {group: about[group] for group in grids[name]}
    left_out = {group: text for group, text in about.items() if group not in chosen}
    sections = {group: str(body["section"]) for group, body in groups.items() if "section" in body}
    return Grid(name, scale, chosen, runs, left_out, sections, path.stem, own_scale)


def _refuse_bad_group(name: str, body: Any, path: Path) -> None:
    if not isinstance(body, dict):
        raise UserError(f"{path}: groups.{name}: is not there; describe it under `groups` or take it out of `grids`")
    if unknown := set(body) - _GROUP_KEYS:
        raise UserError(f"{path}: groups.{name}.{min(unknown)}: unknown; known are {', '.join(sorted(_GROUP_KEYS))}")
    if ("cases" in body) == ("ladder" in body):
        raise UserError(f"{path}: groups.{name}: needs either `cases` or `ladder`")
    for key in _GROUP_KEYS - {"about", "section"}:
        if key in body and not isinstance(body[key], dict):
            raise UserError(f"{path}: groups.{name}.{key}: must hold keys and values")


def _expand(
    group: str, body: Mapping[str, Any], scale: str, seeds: Sequence[int], params: Mapping[str, Any], path: Path
) -> Iterator[Run]:
    each, cases = body.get("each", {}), body.get("cases")
    if cases is None:  # each rung of a ladder keeps what the rungs before it set
        cases = dict(zip(body["ladder"], itertools.accumulate(body["ladder"].values(), operator.or_)))
    points = list(itertools.product(*(value if isinstance(value, list) else [value] for value in each.values())))
    for (label, own), values in itertools.product(cases.items(), points):
        varied = dict(zip(each, values))
        marks = [value if isinstance(value, str) else f"{key.split('.')[-1]}{value}" for key, value in varied.items()]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join([group, str(label), *marks]))
        settings = {"scale": scale} | body.get("settings", {}) | varied | (own or {})
        full = {_full_key(key, scale, params, f"{path}: {group}.{label}"): v for key, v in settings.items()}
        for seed in seeds:
            yield Run(group, str(label), f"{slug}-s{seed}", seed, full | {"seed": seed})


def _full_key(key: str, scale: str, params: Mapping[str, Any], where: str) -> str:
    """`continuation.dtype` -> `scales.study.continuation.dtype`; UserError for a key that params.yaml has not."""
    full = key if key.split(".")[0] in params else f"scales.{scale}.{key}"
    try:
        functools.reduce(operator.getitem, full.split("."), params)
    except (KeyError, TypeError):
        block = params["scales"][scale]
        known = [*params, *(f"{name}.{leaf}" for name, inner in block.items() for leaf in inner)]
        near = difflib.get_close_matches(key, known, 1)
        mend = f"did you mean {near[0]}?" if near else "give a key of params.yaml, e.g. alpha or continuation.dtype"
        raise UserError(f"{where}: {key}: is not a key of params.yaml; {mend}") from None
    return full


def resolve(run: Run, params: Mapping[str, Any], scale: str, where: Path = GRID) -> tuple[dict[str, Any], Config]:
    """The content of params.yaml, its chosen scale alone, as the run will see it, and what it means.

    Args:
        where: the file that the run is from, for what is wrong.

    Raises:
        UserError: one line, naming the run, for each thing that is wrong.
    """
    whole = deepcopy({**params, "scales": {scale: params["scales"][scale]}})
    for key, value in run.settings.items():
        *path, last = key.split(".")
        functools.reduce(operator.getitem, path, whole)[last] = value
    return whole, config_of(whole, f"{where}: {run.slug}")
