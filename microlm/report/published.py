"""Figures that others published, each with its protocol and source, from published.yaml beside this file."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from microlm.errors import UserError
from microlm.files import read_yaml
from microlm.schema import LARGEST_COUNT, parse, within

PUBLISHED = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Figure:
    """One published figure, a fraction; `error` is its standard error, `shots` is None where the source is silent."""

    model: str
    task: str
    metric: str
    value: float = within(-1, 1)
    shots: int | None = within(0, LARGEST_COUNT)
    protocol: str
    source: str
    checked: Literal["read at the source", "second hand"]
    error: float | None = within(0, 1, default=None)


@dataclass(frozen=True)
class _File:
    figures: list[Figure]


def published_figures(path: Path = PUBLISHED) -> list[Figure]:
    """All figures of the file. UserError, a line for each thing that is wrong, if one is not as `Figure` says."""
    raw = read_yaml(path, "install microlm again", "figures: [...]")
    found: list[str] = []
    file = parse(_File, raw, "", found)
    if found or file is None:
        raise UserError("\n".join(f"{path}: {problem}" for problem in found))
    return file.figures


def worth_showing(
    figures: Sequence[Figure], models: Collection[str], measured: Collection[tuple[str, str, int]]
) -> list[Figure]:
    """Those that say something beside our own: of the same model, or of any model under the same protocol.

    A figure of a model that was evaluated at a revision gets that model's name, so that they share a row.

    Args:
        models: as evaluated: a hub id, id@revision or a path.
        measured: task, protocol and shots of what was evaluated.
    """
    tasks, names = {task for task, _, _ in measured}, {name.partition("@")[0]: name for name in models}
    return [
        replace(figure, model=names.get(figure.model, figure.model))
        for figure in figures
        if (figure.task, figure.protocol, figure.shots) in measured or (figure.task in tasks and figure.model in names)
    ]
