"""Records as numpy structured arrays, gold among them: how another reader of the files would see them."""

from pathlib import Path

import numpy as np

from microlm.corpus.batches import Batch
from microlm.teacher.cache import CacheIdentity, TeacherCache
from microlm.teacher.recorders import Recorder


def record_of(identity: CacheIdentity) -> np.dtype:
    """The layout of a record, written down a second time."""
    k, temperatures = identity.top_k, len(identity.temperatures)
    head = (temperatures, k) if identity.projected else (k,)
    said = ("code", np.uint8, head) if identity.record == "compact" else ("log_p", np.float16, head)
    ids = ("ids", np.uint16 if identity.n_vocab <= 2**16 else np.uint32, head)
    marks = [("covered", np.bool_)] if identity.projected else []
    return np.dtype([ids, said, ("log_tail", np.float32, (temperatures,)), *marks])


def with_gold(rows: np.ndarray, gold: np.ndarray, identity: CacheIdentity) -> np.ndarray:
    """Bytes [N, itemsize] and gold [N] -> records [N]."""
    record = record_of(identity)
    assert record.itemsize == identity.layout.itemsize
    records = np.empty(len(gold), np.dtype([*record.descr, ("gold", np.float32)]))
    plain = np.ascontiguousarray(rows).view(record)[:, 0]
    for name in record.names:
        records[name] = plain[name]
    records["gold"] = gold
    return records


def records_of(record: Recorder, batch: Batch) -> np.ndarray:
    labels = record.labels(batch)
    return with_gold(labels.rows.numpy(), labels.gold.numpy(), record.identity)


def cached_records(cache: TeacherCache, windows: np.ndarray) -> np.ndarray:
    """[B, seq_len]."""
    rows, gold = cache.read(windows).numpy(), cache.gold(windows)
    return with_gold(rows, gold.ravel(), cache.identity).reshape(gold.shape)


def read_block(path: Path, identity: CacheIdentity) -> np.ndarray:
    """All records of a block, [N]."""
    content = np.fromfile(path, np.uint8)
    positions = len(content) // identity.token_bytes
    rows, gold = np.split(content, [positions * identity.layout.itemsize])
    return with_gold(rows.reshape(positions, -1), gold.view(np.float32), identity)


def write_block(path: Path, records: np.ndarray, identity: CacheIdentity) -> None:
    record = record_of(identity)
    plain = np.empty(len(records), record)
    for name in record.names:
        plain[name] = records[name]
    path.unlink(missing_ok=True)
    path.write_bytes(plain.tobytes() + records["gold"].tobytes())
