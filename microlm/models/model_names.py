"""What a person calls a model: a folder, or an id on the hub. Which of the two is told by the name, before anyone is
asked for it.
"""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from microlm.errors import UserError
from microlm.runtime.paths import seen_from

WANTED = "a folder with config.json, or a hub id such as gpt2"
PROBE_S = 10.0  # as long as huggingface_hub waits for a file's metadata


def is_path(name: str) -> bool:
    """Whether it can only be meant as a path: the hub's ids are `name` or `owner/name`."""
    first, *rest = name.split("/")
    return (
        name.startswith((".", os.sep, "~"))
        or "\\" in name
        or len(rest) > 1
        or name.endswith("/")
        or Path(name).exists()
        or (bool(rest) and Path(first).is_dir())
    )


def refuse_absent_folder(name: str, key: str = "") -> None:
    """UserError where `name` can only be a path and is no folder; it names those beside it that are spelled alike.

    Args:
        key: what the message begins with, e.g. of params.yaml.
    """
    path = Path(name)
    if path.is_dir() or not is_path(name):
        return
    near = " or ".join(near_folders(Path(name.replace("\\", "/"))))
    meant = f"did you mean {near}?" if near else f"name {WANTED}"
    raise UserError(f"{key}{name}: is no model directory; {meant} ({seen_from()})")


def near_folders(path: Path) -> list[str]:
    """Folders that are called almost like `path`, at the first part of it that is not there."""
    if path.exists():
        return [str(path)] if path.is_dir() else []
    parent, missing = path.parent, path
    while not parent.is_dir():
        parent, missing = parent.parent, parent
    try:
        there = [entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
    rest = path.relative_to(missing)
    found = (parent / name / rest for name in difflib.get_close_matches(missing.name, there, n=2))
    return [str(folder) for folder in found if folder.is_dir()]


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Around a request for a model of the hub: one attempt to reach it, and where that fails what is in the cache.

    huggingface_hub would try each file six times, for half a minute in all.
    """
    from httpx2 import TransportError
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        if not before:
            try:
                get_session().head(constants.ENDPOINT, timeout=PROBE_S)
            except TransportError:
                constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
