"""What each model writes to the same prompts, as stage `evaluate` left it beside the scores."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.files import read_made
from microlm.runtime.paths import SCORES

FILE = "samples.json"


@dataclass(frozen=True)
class Sample:
    """`continuation` is of at most `Samples.max_new_tokens` tokens; `ended`: the model itself ended the text."""

    prompt: str
    continuation: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Samples:
    """The samples of each model that has some, all of the same prompts in the same order."""

    of: Mapping[str, list[Sample]]
    max_new_tokens: int
    decoding: str

    @property
    def prompts(self) -> list[str]:
        return [sample.prompt for sample in next(iter(self.of.values()))]


def read_samples(scores: Path = SCORES) -> Samples | None:
    """Of every model that has them, None where none does: a run from before there were any.

    Raises:
        UserError: a file is damaged, or two are not of the same prompts, length and way to decode.
    """
    files = {name: scores / name / FILE for name in SCORED_MODELS}
    found = {name: read_made(path, f"evaluate@{name}", _read) for name, path in files.items() if path.is_file()}
    if not found:
        return None
    (first, (how, samples)), *others = found.items()
    for other, (their_way, theirs) in others:
        if their_way != how or [one.prompt for one in theirs] != [one.prompt for one in samples]:
            raise UserError(
                f"{files[other]} and {files[first]} are not of the same prompts, decoded alike; "
                f"write both again with: dvc repro -f -s evaluate@{first} evaluate@{other}"
            )
    return Samples({name: samples for name, (_, samples) in found.items()}, *how)


def _read(path: Path) -> tuple[tuple[int, str], list[Sample]]:
    """ValueError or KeyError where the file is not as stage `evaluate` writes it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    samples = [Sample(*(_typed(row, key, kind) for key, kind in Sample.__annotations__.items()))
               for row in _typed(content, "samples", list)]  # fmt: skip
    if not samples:
        raise ValueError("it has no sample")
    return (_typed(content, "max_new_tokens", int), _typed(content, "decoding", str)), samples


def _typed(block: Any, key: str, kind: type) -> Any:
    if not isinstance(block, dict):
        raise ValueError("not an object of keys and values")
    if type(block[key]) is not kind:
        raise ValueError(f"{key} is not {kind.__name__}")
    return block[key]
