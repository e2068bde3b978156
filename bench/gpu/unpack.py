"""The bundle on the machine that runs: its halves checked, its wheels importable, its data laid out.

It is read before anything else of the project: what is imported here needs no package but tqdm.

    gpu-bundle/a/manifest.json      files of this half with their sha256, what each makes, and a digest of both halves
    gpu-bundle/a/...                the files, gzip-compressed but for wheels; a large one is in pieces
    gpu-bundle/b/                   likewise
"""

import atexit
import gzip
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from microlm.corpus.parts import extract
from microlm.errors import UserError, run_stage
from microlm.files import refuse_unsealed, sha256_file

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = Path("gpu-bundle")  # in the repository's top folder, ignored by Git
HALVES = ("a", "b")
FORMAT, VERSION = "microlm-gpu-bundle", 1
MANIFEST = "manifest.json"
MEND = "copy that half again; python -m bench.gpu.bundle makes both"
WHEELS = "wheels/"  # what is made below it is to be imported, all else goes into the workspace


def is_there(root: Path = ROOT) -> bool:
    return (root / BUNDLE).is_dir()


def read_bundle(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Both halves' entries by path from `root`, every file held against its sha256.

    Raises:
        UserError: a half is missing, damaged or of another build; one line that names the file.
    """
    found: dict[str, dict[str, Any]] = {}
    builds = set()
    for half in HALVES:
        folder = root / BUNDLE / half
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{BUNDLE / half}: this half of the bundle is not there, or lacks its {MANIFEST}; {MEND}")
        manifest = _manifest(folder / MANIFEST, BUNDLE / half / MANIFEST)
        builds.add(manifest["build"])
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file() or sha256_file(path) != entry["sha256"]:
                raise UserError(f"{BUNDLE / half / name}: absent or damaged, its sha256 is not the manifest's; {MEND}")
            if ".." in Path(entry["makes"]).parts or Path(entry["makes"]).is_absolute():
                raise UserError(f"{BUNDLE / half / MANIFEST}: refused, {entry['makes']!r} leaves the workspace; {MEND}")
            found[str(BUNDLE / half / name)] = entry
    if len(builds) > 1:
        raise UserError(f"{BUNDLE}: its halves are of two different builds; copy both again")
    return found


def _manifest(path: Path, said: Path) -> dict[str, Any]:
    """Whole and of this format, or a UserError that calls it `said`."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: damaged ({error}); {MEND}") from None
    known = isinstance(manifest, dict) and (manifest.get("format"), manifest.get("version")) == (FORMAT, VERSION)
    if not known or "sha256" not in manifest:
        raise UserError(f"{said}: not {FORMAT} version {VERSION}; {MEND}")
    refuse_unsealed(manifest, said, MEND)
    return manifest


def put_wheels_on_path(root: Path = ROOT) -> None:
    """Make the bundle's packages importable, here and in children, where the machine has none of its own."""
    if not is_there(root):
        return
    entries: dict[str, dict[str, Any]] = {}
    run_stage(lambda: entries.update(read_bundle(root)))
    folder = Path(tempfile.mkdtemp(prefix="microlm-wheels-"))
    atexit.register(_remove, folder, os.getpid())
    for path, entry in entries.items():
        if entry["makes"].startswith(WHEELS) and importlib.util.find_spec(entry["imports"]) is None:
            with zipfile.ZipFile(root / path) as wheel:
                members = [name for name in wheel.namelist() if not name.endswith("/")]
            extract(root / path, members, folder)
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not when a forked child ends
        shutil.rmtree(folder, ignore_errors=True)


def lay_out(workspace: Path, root: Path = ROOT) -> None:
    """data/ of `workspace`: the bundle's, or else the repository's own.

    Raises:
        UserError: as `read_bundle`; or there is neither.
    """
    if is_there(root):
        for made, pieces in _by_target(read_bundle(root)).items():
            target = workspace / made
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as out:
                for _, path in sorted(pieces):
                    with gzip.open(root / path) as piece:
                        shutil.copyfileobj(piece, out, 1 << 20)
    elif all((root / "data" / name / MANIFEST).is_file() for name in ("shards", "parts")):
        (workspace / "data").mkdir(parents=True)
        for name in ("shards", "parts"):
            (workspace / "data" / name).symlink_to((root / "data" / name).resolve())
    else:
        raise UserError(
            f"{BUNDLE}: no bundle is here, nor data/shards and data/parts; make it where there is a network with: "
            "make gpu-bundle, and copy both of its halves to this folder"
        )


def _by_target(entries: dict[str, dict[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    """File to be made -> its pieces as (number, path); wheels left out."""
    found: dict[str, list[tuple[int, str]]] = {}
    for path, entry in entries.items():
        if not entry["makes"].startswith(WHEELS):
            found.setdefault(entry["makes"], []).append((entry["piece"], path))
    return found
