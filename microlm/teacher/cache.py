"""The teacher's top-k cache: fixed-width records, memory-mapped, found by (window, position), O(1) a token.

    data/teacher/manifest.json      whose cache this is (see CacheIdentity), with its own checksum, written last
    data/teacher/block-00000.bin    records (see records.py) of consecutive cached windows, [windows, seq_len], and
                                    after them, float32 [windows, seq_len], the log-probability of the token that
                                    follows each position in the text
    data/teacher/table.bin          for each captured temperature, the logarithm of the mean distribution (see
                                    objective/tails.py), float32 [temperatures, n_vocab]

Of a teacher that runs live in the students' steps there are a manifest and the table alone.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, cached_windows
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import read_json, refuse_unsealed, sealed, sha256_file, sha256_json, write_json
from microlm.models.teacher_source import teacher_source
from microlm.objective.divergences import SparseTeacher, temper
from microlm.parameters import TeacherConfig
from microlm.runtime import distributed
from microlm.runtime.cores import available_cores
from microlm.runtime.resume import resume_root
from microlm.teacher.records import RecordLayout

FORMAT, VERSION = "microlm-teacher-cache", 3
MANIFEST, TABLE = "manifest.json", "table.bin"
REMAKE = "make it again with: dvc repro -f -s teacher"
SMALLEST_BLOCK, LARGEST_BLOCK, WANTED_BLOCKS = 2**22, 2**28, 16
TRUSTED_BYTES = 2**32  # hashed in two seconds; what is larger is not hashed at every start
GOLD = np.dtype(np.float32)


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
    record: str = "full"  # full | compact
    source: str = "cache"  # cache | live: no blocks, the table alone
    # None where the reader cannot know or does not care; the manifest always has them
    weights_sha256: str | None = None
    dtype: str | None = None  # of the teacher's activations
    # fingerprint of the teacher's own, where it is not the corpus's and the records are projected
    teacher_tokenizer: str | None = None

    @property
    def projected(self) -> bool:
        return self.teacher_tokenizer is not None

    @property
    def layout(self) -> RecordLayout:
        return RecordLayout(self.record, self.n_vocab, self.top_k, len(self.temperatures), self.projected)

    @property
    def token_bytes(self) -> int:
        """Bytes of one position on the disk."""
        return self.layout.itemsize + GOLD.itemsize

    def block_windows(self) -> int:
        """Windows in one block: enough bytes to read well, few enough that a killed capture loses little."""
        window_bytes = self.seq_len * self.token_bytes
        wanted = min(max(window_bytes * self.windows // WANTED_BLOCKS, SMALLEST_BLOCK), LARGEST_BLOCK)
        return max(1, wanted // window_bytes)

    def blocks(self) -> list[tuple[str, slice]]:
        """Each block's file name and the places of its windows in the list of cached windows."""
        size, windows = self.block_windows(), self.windows if self.source == "cache" else 0
        starts = enumerate(range(0, windows, size))
        return [(f"block-{index:05d}.bin", slice(start, min(start + size, windows))) for index, start in starts]

    def as_json(self) -> dict[str, Any]:
        fields = {**asdict(self), "temperatures": list(self.temperatures)}
        if not self.projected:  # the manifest of a teacher that shares the corpus's tokenizer names it once
            del fields["teacher_tokenizer"]
        return fields


def cache_identity(teacher: TeacherConfig, seq_len: int, shards: TokenShards) -> CacheIdentity:
    """What the cache of this teacher's word on windows of this corpus has to say of itself."""
    tokenizer = shards.manifest["tokenizer"]
    try:
        weights_sha256 = teacher_source(teacher).fingerprint()  # None of a hub id, whose revision pins them
    except UserError:  # the packaged teacher was not fetched, and its cache came from elsewhere
        weights_sha256 = None
    return CacheIdentity(
        teacher=teacher.model,
        revision=teacher.revision,
        tokenizer=tokenizer["fingerprint"],
        n_vocab=tokenizer["n_vocab"],
        corpus=shards.digest,
        seq_len=seq_len,
        windows=len(cached_windows(shards, seq_len, teacher.windows)),
        top_k=teacher.top_k,
        temperatures=tuple(teacher.temperatures),
        record=teacher.record,
        source=teacher.source,
        weights_sha256=weights_sha256,
    )


def manifest_of(identity: CacheIdentity, weights_sha256: str, dtype: str, directory: Path) -> dict[str, Any]:
    """The manifest of the files in `directory`."""
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


def seal_file(path: Path, sha256: str, **sums: float) -> None:
    """Write the sha256 of a finished file beside it, for the hours until the manifest has it, and what was summed."""
    write_json(_seal(path), {"sha256": sha256, **sums})


def is_finished(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes and _seal(path).is_file()


def sealed_sums(path: Path) -> dict[str, Any]:
    """What `seal_file` was told of a finished file."""
    return read_json(_seal(path), "teacher")


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _checked_sha256(path: Path) -> str:
    """UserError where the file is no longer what was sealed."""
    digest = sha256_file(path)
    if _seal(path).is_file() and sealed_sums(path)["sha256"] != digest:
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
        for field, wanted in expected.as_json().items():
            unknown = wanted is None and field in ("weights_sha256", "dtype")
            if manifest.get(field) != wanted and not unknown:
                raise UserError(f"{where}: {field} is {manifest.get(field)!r}, but this run has {wanted!r}; {REMAKE}")
        expected = replace(expected, teacher_tokenizer=manifest.get("teacher_tokenizer"))
        self.identity, self.manifest = expected, manifest
        self._windows, self._size = windows, expected.block_windows()
        listed = {block["file"]: block["sha256"] for block in manifest["blocks"]}
        lengths = {name: part.stop - part.start for name, part in expected.blocks()}
        sizes = {name: windows * expected.seq_len * expected.token_bytes for name, windows in lengths.items()}
        table = (len(expected.temperatures), expected.n_vocab)
        sizes[TABLE], listed[TABLE] = table[0] * table[1] * 4, manifest.get("table_sha256")
        _verify(directory, sizes, listed)
        self._blocks = [map_block(directory / name, expected, windows) for name, windows in lengths.items()]
        self.tables = torch.from_numpy(np.fromfile(directory / TABLE, np.float32).reshape(table))

    @property
    def dtype(self) -> torch.dtype:
        """Of the teacher's activations at the capture."""
        return getattr(torch, self.manifest["dtype"].removeprefix("torch."))

    def read(self, windows: np.ndarray) -> Tensor:
        """Records of whole windows, uint8 [B * seq_len, itemsize]. KeyError for a window that is not cached."""
        return torch.from_numpy(np.concatenate([records for records, _ in self._of(windows)]))

    def gold(self, windows: np.ndarray) -> np.ndarray:
        """Log-probabilities of the text's own tokens, float32 [B, seq_len]. KeyError as `read`."""
        return np.stack([gold for _, gold in self._of(windows)])

    def mean_gold(self) -> np.ndarray:
        """Mean over each cached window of those, float64 [W]; of the files only the gold columns are read."""
        return np.concatenate([gold.mean(-1, dtype=np.float64) for _, gold in self._blocks])

    def of_batch(self, batch: Batch, temperature: float) -> SparseTeacher:
        """What the fused head wants of B windows, N = B * seq_len rows, on the batch's device. UserError as
        `sparse_teacher`. The batch brought its records along, or they are read now.
        """
        device = batch.tokens.device
        self.tables = self.tables.to(device)  # once: a copy from memory that is not pinned waits for the device
        records = self.read(batch.windows).to(device) if batch.records is None else batch.records
        return sparse_teacher(records, self.identity, self.tables, temperature)

    def _of(self, windows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Records and gold of each window."""
        places = np.searchsorted(self._windows, windows)
        if (places >= len(self._windows)).any() or (self._windows[places] != windows).any():
            raise KeyError(f"some of the windows {windows.tolist()} are not cached")
        found = ((self._blocks[i // self._size], i % self._size) for i in places)
        return [(records[i], gold[i]) for (records, gold), i in found]


def sparse_teacher(records: Tensor, identity: CacheIdentity, tables: Tensor, temperature: float) -> SparseTeacher:
    """Records uint8 [N, itemsize] and tables [temperatures, V] as the fused head wants them, at a captured temperature,
    on the records' device.

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
    said, table = identity.layout.unpack(records), tables[at].to(records.device)
    log_tail = said.log_tail[:, at]
    if not identity.projected:
        return SparseTeacher(said.ids, temper(said.log_p, log_tail, temperature), table)
    # its log_p is of this temperature already; the rounding is normalized away
    return SparseTeacher(said.ids[:, at], temper(said.log_p[:, at], log_tail, 1.0), table, said.covered)


def map_block(path: Path, identity: CacheIdentity, windows: int) -> tuple[np.ndarray, np.ndarray]:
    """A block of `windows` windows, memory-mapped: records uint8 [W, seq_len, itemsize], gold float32 [W, seq_len]."""
    itemsize = identity.layout.itemsize
    positions = windows * identity.seq_len
    records = np.memmap(path, np.uint8, "r", shape=(windows, identity.seq_len, itemsize))
    gold = np.memmap(path, GOLD, "r", offset=positions * itemsize, shape=(windows, identity.seq_len))
    return records, gold


def _verify(directory: Path, sizes: dict[str, int], sha256: dict[str, str | None]) -> None:
    """Each file's size and sha256; of several processes on a machine the first one does the reading for all.

    A cache of more than TRUSTED_BYTES is hashed once and then known by its files' sizes, times and inodes: a start
    would wait minutes for what was checked an hour ago.

    Raises:
        UserError: a file is absent or another than it should be.
    """
    seen = {}
    for name, expected in sizes.items():
        path = directory / name
        if sha256.get(name) is None or not path.is_file():
            raise UserError(f"{path} is not there or not in the manifest; {REMAKE}")
        found = path.stat()
        if found.st_size != expected:
            raise UserError(f"{path}: {found.st_size} bytes long, expected {expected}; {REMAKE}")
        seen[name] = [found.st_size, found.st_mtime_ns, found.st_ino, sha256[name]]
    if distributed.local_rank() == 0:
        memo = resume_root() / f"verified-{sha256_json(str(directory.resolve()))[:16]}.json"
        large, known = sum(sizes.values()) > TRUSTED_BYTES, {}
        if large:
            with suppress(UserError):  # absent or damaged: all is hashed again
                known = read_json(memo, "teacher")
        unknown = [name for name in sizes if known.get(name) != seen[name]]
        with ThreadPoolExecutor(available_cores()) as readers:
            for name, found in zip(unknown, readers.map(lambda name: sha256_file(directory / name), unknown)):
                if found != sha256[name]:
                    raise UserError(f"{directory / name}: its sha256 is not the manifest's; {REMAKE}")
        if unknown and large:
            write_json(memo, seen)
    distributed.wait_for_all()
