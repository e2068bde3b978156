"""The teacher's top-k cache: fixed-width records, memory-mapped, found by (window, position), O(1) a token.

    data/teacher/manifest.json      whose cache this is (see CacheIdentity), with its own checksum, written last
    data/teacher/block-00000.bin    records of consecutive cached windows, [windows, seq_len]
    data/teacher/table.bin          for each captured temperature, the logarithm of the mean distribution (see
                                    objective/table_tail.py), float32 [temperatures, n_vocab]

A record holds what the teacher says of the token after a position:

    ids       k of the k most likely tokens, uint16 where the vocabulary allows
    log_p     k log-probabilities at temperature 1, float16
    log_tail  for each captured temperature T, log of the sum of p^(1/T) over all other tokens, float32
    gold      log-probability of the token that follows in the text, float32

That of a teacher with another tokenizer (see projection.py) holds ids and log_p for each captured temperature, [T, k],
since the projected distribution at a temperature does not follow from that at another, log_tail of the probabilities
themselves, and

    covered   whether the teacher speaks of this position at all
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microlm import hub
from microlm.config import Config
from microlm.corpus.batches import cached_windows
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import atomic_file, read_json, refuse_unsealed, sealed, sha256_file
from microlm.objective.definition import SparseTeacher
from microlm.objective.divergences import temper
from microlm.scale import TeacherConfig

FORMAT, VERSION = "microlm-teacher-cache", 2
MANIFEST, TABLE = "manifest.json", "table.bin"
REMAKE = "make it again with: dvc repro -f -s teacher"
SMALLEST_BLOCK, LARGEST_BLOCK, WANTED_BLOCKS = 2**22, 2**28, 16


@dataclass(frozen=True)
class CacheIdentity:
    """All that a record's meaning depends on. A reader refuses a cache in which any of it differs."""

    teacher: str  # "packaged", a folder or a hub id
    revision: str | None
    tokenizer: str  # fingerprint
    n_vocab: int
    corpus: str  # digest of the token shards' split
    seq_len: int
    windows: int  # evenly spaced ones of the split
    top_k: int
    temperatures: tuple[float, ...]
    # None where the reader cannot know or does not care; the manifest always has them
    weights_sha256: str | None = None
    dtype: str | None = None  # of the teacher's activations
    # fingerprint of the teacher's own, where it is not the corpus's and the records are projected
    teacher_tokenizer: str | None = None

    @property
    def projected(self) -> bool:
        return self.teacher_tokenizer is not None

    def record(self) -> np.dtype:
        shape = (len(self.temperatures), self.top_k) if self.projected else (self.top_k,)
        return np.dtype(
            [
                ("ids", np.uint16 if self.n_vocab <= 2**16 else np.uint32, shape),
                ("log_p", np.float16, shape),
                ("log_tail", np.float32, (len(self.temperatures),)),
                ("gold", np.float32),
                *([("covered", np.bool_)] if self.projected else []),
            ]
        )

    def block_windows(self) -> int:
        """Windows in one block: enough bytes to read well, few enough that a killed capture loses little."""
        window_bytes = self.seq_len * self.record().itemsize
        wanted = min(max(window_bytes * self.windows // WANTED_BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
        return max(1, wanted // window_bytes)

    def blocks(self) -> Iterator[tuple[str, slice]]:
        """Each block's file name and the places of its windows in the list of cached windows."""
        size = self.block_windows()
        for index, start in enumerate(range(0, self.windows, size)):
            yield f"block-{index:05d}.bin", slice(start, min(start + size, self.windows))

    def claims(self) -> dict[str, Any]:
        """The manifest's fields that a reader holds against the cache."""
        unknown = {name for name in ("weights_sha256", "dtype") if getattr(self, name) is None}
        return {name: value for name, value in self.as_json().items() if name not in unknown}

    def as_json(self) -> dict[str, Any]:
        fields = {**asdict(self), "temperatures": list(self.temperatures)}
        if not self.projected:  # the manifest of a teacher that shares the corpus's tokenizer names it once
            del fields["teacher_tokenizer"]
        return fields


def cache_identity(config: Config, shards: TokenShards) -> CacheIdentity:
    """What the cache of this configuration and corpus has to say of itself."""
    tokenizer, teacher = shards.manifest["tokenizer"], config.at.teacher
    return CacheIdentity(
        teacher=teacher.model,
        revision=teacher.revision,
        tokenizer=tokenizer["fingerprint"],
        n_vocab=tokenizer["n_vocab"],
        corpus=shards.digest,
        seq_len=config.at.batch.seq_len,
        windows=len(cached_windows(shards, config.at.batch.seq_len, teacher.windows)),
        top_k=teacher.top_k,
        temperatures=tuple(teacher.temperatures),
        weights_sha256=weights_at_hand(teacher),
    )


def weights_at_hand(teacher: TeacherConfig) -> str | None:
    """Fingerprint of the teacher's weights where their files are here; a hub id's are pinned by its revision."""
    if teacher.model != "packaged" and not any(Path(teacher.model).glob("*.safetensors")):
        return None
    try:
        return hub.teacher_fingerprint(teacher, None)
    except UserError:  # the packaged teacher was not fetched, and its cache came from elsewhere
        return None


def manifest_of(identity: CacheIdentity, weights_sha256: str, dtype: str, directory: Path) -> dict[str, Any]:
    """The manifest of the blocks in `directory`."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **identity.as_json(),
        "weights_sha256": weights_sha256,
        "dtype": dtype,
        "blocks": [{"file": name, "sha256": _checked_sha256(directory / name)} for name, _ in identity.blocks()],
        "table_sha256": _checked_sha256(directory / TABLE),
    }
    return sealed(manifest)


def seal_file(path: Path) -> None:
    """Write the sha256 of a finished file beside it, for the hours until the manifest has it."""
    with atomic_file(_seal(path), "w") as file:
        file.write(sha256_file(path) + "\n")


def is_finished(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes and _seal(path).is_file()


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checked_sha256(path: Path) -> str:
    """UserError where the file is no longer what was sealed."""
    digest = sha256_file(path)
    if _seal(path).is_file() and _seal(path).read_text().strip() != digest:
        raise UserError(f"{path}: damaged since it was written; remove it, then run the same command again")
    return digest


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest of this format, whole. UserError naming the file otherwise."""
    manifest = read_json(path, "teacher")
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        said = f"format {manifest.get('format')!r}, version {manifest.get('version')!r}"
        raise UserError(f"{path}: {said}, but this code reads {FORMAT!r}, version {VERSION}; {REMAKE}")
    if "sha256" not in manifest:
        raise UserError(f"{path}: damaged, it has no sha256; {REMAKE}")
    refuse_unsealed(manifest, path, REMAKE)
    return manifest


class TeacherCache:
    """A cache open for reading, checked whole: manifest against what is expected, each file's size and sha256.

    Attributes:
        tables: float32 [temperatures, V].
    """

    def __init__(self, directory: Path, expected: CacheIdentity, windows: np.ndarray) -> None:
        """
        Args:
            windows: the windows of the split that the cache must hold, ascending.

        Raises:
            UserError: naming the file, and the field that differs or the check that failed.
        """
        where = directory / MANIFEST
        manifest = read_manifest(where)
        for field, wanted in expected.claims().items():
            if manifest.get(field) != wanted:
                raise UserError(f"{where}: {field} is {manifest.get(field)!r}, but this run has {wanted!r}; {REMAKE}")
        expected = replace(expected, teacher_tokenizer=manifest.get("teacher_tokenizer"))
        self.identity, self.manifest = expected, manifest
        self._windows = windows
        self._size = expected.block_windows()
        listed = {block["file"]: block["sha256"] for block in manifest["blocks"]}
        self._blocks = [
            _open_block(
                directory / name, listed.get(name), expected.record(), (part.stop - part.start, expected.seq_len)
            )
            for name, part in expected.blocks()
        ]
        shape = (len(expected.temperatures), expected.n_vocab)
        table = _open_block(directory / TABLE, manifest.get("table_sha256"), np.dtype(np.float32), shape)
        self.tables = torch.from_numpy(np.array(table))

    @property
    def dtype(self) -> torch.dtype:
        """Of the teacher's activations at the capture."""
        return getattr(torch, self.manifest["dtype"].removeprefix("torch."))

    def records(self, windows: np.ndarray) -> np.ndarray:
        """Records of whole windows, [B, seq_len] of the record's dtype. KeyError for a window that is not cached."""
        places = np.searchsorted(self._windows, windows)
        if (places >= len(self._windows)).any() or (self._windows[places] != windows).any():
            raise KeyError(f"some of the windows {windows.tolist()} are not cached")
        return np.stack([self._blocks[place // self._size][place % self._size] for place in places])

    def teacher(self, windows: np.ndarray, temperature: float, device: torch.device | str = "cpu") -> SparseTeacher:
        """What the fused head wants of B windows, N = B * seq_len rows. UserError as `sparse_teacher`."""
        return sparse_teacher(self.records(windows).reshape(-1), self.identity, self.tables, temperature, device)


def sparse_teacher(
    records: np.ndarray,
    identity: CacheIdentity,
    tables: Tensor,
    temperature: float,
    device: torch.device | str = "cpu",
) -> SparseTeacher:
    """Records [N] and tables [temperatures, V] as the fused head wants them, at a captured temperature.

    Raises:
        UserError: the tail's mass was not captured at this temperature; nothing else in a record fixes it.
    """
    if temperature not in identity.temperatures:
        raise UserError(
            f"params.yaml: temperature: {temperature:g} is not in the teacher's cache, which holds "
            f"{', '.join(f'{captured:g}' for captured in identity.temperatures)}; choose one of these, or add it to "
            f"teacher.temperatures and {REMAKE}"
        )
    at = identity.temperatures.index(temperature)
    head = (slice(None), at) if identity.projected else slice(None)
    log_p = torch.from_numpy(records["log_p"][head].astype(np.float32)).to(device)
    log_tail = torch.from_numpy(records["log_tail"][:, at].copy()).to(device)
    ids = torch.from_numpy(records["ids"][head].astype(np.int64)).to(device)
    if not identity.projected:
        return SparseTeacher(ids, temper(log_p, log_tail, temperature), tables[at].to(device))
    mark = torch.from_numpy(records["covered"].copy()).to(device)
    # its log_p is of this temperature already; the rounding is normalized away
    return SparseTeacher(ids, temper(log_p, log_tail, 1.0), tables[at].to(device), mark)


def covered(records: np.ndarray) -> np.ndarray:
    """Where the teacher speaks, bool of the records' shape: everywhere, unless they are projected."""
    return records["covered"] if "covered" in records.dtype.names else np.ones(records.shape, bool)


def _open_block(path: Path, sha256: str | None, record: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    if sha256 is None or not path.is_file():
        raise UserError(f"{path} is not there or not in the manifest; {REMAKE}")
    expected = shape[0] * shape[1] * record.itemsize
    if path.stat().st_size != expected:
        raise UserError(f"{path}: {path.stat().st_size} bytes long, expected {expected}; {REMAKE}")
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: its sha256 is not the manifest's; {REMAKE}")
    return np.memmap(path, record, "r", shape=shape)
