"""Write, then rename: the only way anything reaches the disk.

A reader sees the old file, the new file or no file, never half of one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from microlm.errors import UserError


def _fsync_directory(directory: Path) -> None:
    # a rename alone may not survive a power cut: the folder's own entry has to be flushed too
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it becomes `path`, on any error it is gone."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(
            temporary, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else ""
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync_directory(path.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it replaces `path`, on any error it is gone."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        replace_directory(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_directory(source: Path, target: Path) -> None:
    """Move the folder `source` to `target`; what was at `target` goes only once the new one stands."""
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, retired)  # rename(2) does not replace a folder that holds files
    try:
        os.replace(source, target)
    except BaseException:
        if retired.exists():
            os.replace(retired, target)
        raise
    shutil.rmtree(retired, ignore_errors=True)
    _fsync_directory(target.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. ValueError if it holds a NaN or an infinity, which JSON has not."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path, "w") as file:
        file.write(text)


def read_json(path: str | Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object that the stage `made_by` wrote. UserError if it is absent or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with: dvc repro {made_by}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again with: dvc repro -f -s {made_by}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (not a JSON object); make it again with: dvc repro -f -s {made_by}")
    return value


def read_yaml(path: Path, absent: str, example: str) -> dict[str, Any]:
    """A YAML 1.2 file that holds keys and values.

    Args:
        absent: how to mend that it is not there.
        example: of a key and its value.

    Raises:
        UserError: it is not there, not YAML or not keys and values; one line.
    """
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; {absent}") from None
    except (UnicodeDecodeError, YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must hold keys and values, e.g. `{example}`")
    return raw


def sha256_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_json(value: Any) -> str:
    """Hash of a value's canonical JSON: the same for the same content, whatever the order of keys."""
    return sha256_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
