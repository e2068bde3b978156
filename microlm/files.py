"""Write, then rename: the only way anything reaches the disk.

A reader sees the old file, the new file or no file, never half of one.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from microlm.errors import UserError

SUMS = "SHA256SUMS"

T = TypeVar("T")


def _fsync(path: Path) -> None:
    """Of a folder too, after a rename in it: the rename alone may not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _leftovers(path: Path, kind: str) -> list[Path]:
    """What dead writers of `path` left beside it: a killed process tidies nothing up."""
    import psutil  # what unpacks a bundle for a bare machine reads this module without

    written = re.compile(rf"\.{re.escape(path.name)}\.([0-9]+)\.{kind}")
    found = filter(None, map(written.fullmatch, os.listdir(path.parent)))
    return [path.with_name(match[0]) for match in found if not psutil.pid_exists(int(match[1]))]


def _sweep(path: Path, kind: str) -> None:
    for left in _leftovers(path, kind):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Where to make what `path` is to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path, "tmp")
    return _beside(path, "tmp")


@contextmanager
def temporary_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, to make there what `path` is to be; it is gone afterwards."""
    temporary = _temporary(Path(path))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it becomes `path`, on any error it is gone."""
    path = Path(path)
    temporary = _temporary(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it replaces `path`, on any error it is gone.

    What was at `path` goes only once the new one stands.
    """
    path = Path(path)
    old = _beside(path, "old")
    with temporary_directory(path) as temporary:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            _fsync(file)
        if path.exists():
            os.replace(path, old)  # rename(2) does not replace a folder that holds files
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
    shutil.rmtree(old, ignore_errors=True)
    _sweep(path, "old")  # only now: until the new one stood, the old one was all there was
    _fsync(path.parent)


def remove_directory(path: Path) -> None:
    """Remove the folder in one step: killed at any moment, it is there whole or not at all."""
    _sweep(path, "old")
    os.replace(path, _beside(path, "old"))
    shutil.rmtree(_beside(path, "old"))


def recover_directory(path: Path) -> None:
    """Bring back the old folder where its replacer was killed between putting it aside and putting up the new one."""
    if path.parent.is_dir() and not path.exists():
        for left in _leftovers(path, "old")[:1]:
            os.replace(left, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. ValueError if it holds a NaN or an infinity, which JSON has not."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path, "w") as file:
        file.write(text)


def read_made(path: Path, stage: str, read: Callable[[Path], T], *errors: type[Exception]) -> T:
    """What `read` makes of a file that a stage wrote. UserError where it is absent, or `read` fails: it is damaged.

    Args:
        errors: of `read`, beside ValueError, KeyError and EOFError.
    """
    try:
        return read(path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with: dvc repro {stage}") from None
    except (ValueError, KeyError, EOFError, *errors) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); make it again with: dvc repro -f -s {stage}") from None


def read_json(path: str | Path, made_by: str) -> dict[str, Any]:
    """Read a JSON object that the stage `made_by` wrote. UserError if it is absent or damaged."""

    def read(path: Path) -> dict[str, Any]:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value

    return read_made(Path(path), made_by, read)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with the sha256 of all the rest of it, so that a damaged file is not taken for another one."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return {**rest, "sha256": sha256_json(rest)}


def refuse_unsealed(content: dict[str, Any], path: Path, mend: str) -> None:
    """UserError where `content`, read from `path`, has a seal that is not `sealed`'s."""
    with suppress(ValueError):  # of a NaN, which nothing that we write holds
        if "sha256" not in content or content == sealed(content):
            return
    raise UserError(f"{path}: damaged, its sha256 is not that of its content; {mend}")


def write_sums(directory: Path) -> None:
    """Write SHA256SUMS, which `sha256sum --check` reads too, of all files of the folder."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != SUMS)
    with atomic_file(directory / SUMS, "w") as file:
        file.write("".join(f"{sha256_file(directory / name)}  {name}\n" for name in names))


def check_sums(directory: Path, names: Iterable[str], mend: str) -> None:
    """Hold files of the folder against its SHA256SUMS, where it has one. UserError names the first that differs."""
    sums = directory / SUMS
    if not sums.is_file():
        return
    try:
        listed = dict(reversed(line.split("  ", 1)) for line in sums.read_text(encoding="utf-8").splitlines())
    except ValueError:
        raise UserError(f"{sums}: damaged; {mend}") from None
    for name in names:
        if name != SUMS and (directory / name).is_file() and sha256_file(directory / name) != listed.get(name):
            raise UserError(f"{directory / name}: damaged, its sha256 is not the one in {SUMS}; {mend}")


def read_yaml(path: Path, absent: str, example: str) -> dict[str, Any]:
    """A YAML 1.2 file that holds keys and values.

    Args:
        absent: how to mend that it is not there.
        example: of a key and its value.

    Raises:
        UserError: it is not there, not YAML or not keys and values; one line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

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
