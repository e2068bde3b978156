"""A model as a person names it: a folder, a hub id with its revision, or `packaged`."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from microlm.errors import UserError
from microlm.models.model_names import refuse_absent_folder

if TYPE_CHECKING:
    import torch

    from microlm.evaluation.candidates import Candidate

HELP = "a model directory, a hub id[@revision] or packaged"


def normal_name(name: str) -> str:
    """A folder's name without what says nothing, e.g. a slash at its end. UserError where a folder is not there."""
    refuse_absent_folder(without_revision(name)[0], "MODEL: ")
    return os.path.normpath(name) if os.path.isdir(name) else name


def without_revision(name: str) -> tuple[str, str | None]:
    """A hub id and its revision; a folder has none."""
    if os.path.isdir(name):
        return name, None
    name, _, revision = name.partition("@")
    return name, revision or None


def refuse_repetition(key: str, given: Sequence[object]) -> None:
    """Two of the same would be one column, or one folder of results."""
    repeated = [value for place, value in enumerate(given) if value in given[:place]]
    if repeated:
        raise UserError(f"{key}: {repeated[0]} is named twice; name it once")


def load_named(name: str, dtype: "torch.dtype") -> "Candidate":
    """UserError as `load_candidate`."""
    from microlm.evaluation.candidates import load_candidate

    return load_candidate(*without_revision(name), dtype)
