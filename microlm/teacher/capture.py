"""Run the teacher once over the windows that students will see, and write what it says as the top-k cache."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch

from microlm.corpus.batches import Batch, evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.evaluation.scoring.held_out_loss import ValidationLoss
from microlm.files import atomic_file
from microlm.runtime import distributed
from microlm.teacher.cache import TABLE, CacheIdentity, is_finished, seal_file
from microlm.teacher.projection import Aligned, loss_of_gold
from microlm.teacher.recorders import Recorder
from microlm.teacher.records import Labels

T = TypeVar("T")
TABLE_WINDOWS = 32  # evenly spaced: the table is a mean of whole distributions, a few thousand positions fix it


def capture(
    record: Recorder,
    shards: TokenShards,
    windows: np.ndarray,
    directory: Path,
    batch_rows: int,
    progress: Callable[[int], object],
) -> int:
    """Write every block that `directory` does not hold yet, each whole or not at all, and the table.

    Several processes deal the blocks among them: one writer a block, the first one writes the table. Killed at any
    moment and called again, it leaves the same bytes as a call that was not. `directory` is the caller's alone (see
    resume.py). For a teacher whose source is live the table is all.

    Args:
        progress: told the tokens of this process's blocks done, those of blocks found on disk included.

    Returns:
        Tokens that this call sent through the teacher, in all processes.
    """
    identity = record.identity
    if distributed.is_first():
        for torn in directory.glob(".*.tmp"):  # of a killed call, which the disk may have no room for
            torn.unlink()
    distributed.wait_for_all()
    fresh = 0
    for name, part in distributed.dealt(identity.blocks()):
        tokens = (part.stop - part.start) * identity.seq_len
        if is_finished(directory / name, tokens * identity.token_bytes):
            progress(tokens)
            continue
        with atomic_file(directory / name) as file:
            sums = _write_block(file, labelled(record, shards, windows[part], batch_rows), identity, progress)
        seal_file(directory / name, **sums)
        fresh += tokens
    if distributed.is_first() and not is_finished(directory / TABLE, 4 * len(identity.temperatures) * identity.n_vocab):
        table = tail_table(record, shards, windows, batch_rows).tobytes()
        with atomic_file(directory / TABLE) as file:
            file.write(table)
        seal_file(directory / TABLE, sha256(table).hexdigest())
    return int(distributed.sum_over_ranks(torch.tensor(fresh)))  # which waits for the last block


def _write_block(
    file: IO[bytes], batches: Iterable[Labels], identity: CacheIdentity, progress: Callable[[int], object]
) -> dict[str, object]:
    """Records, then the gold column; returns what `seal_file` is told, the sha256 among it."""
    digest, gold, head_mass = sha256(), [], 0.0
    at = identity.temperatures.index(1.0)

    def write(content: bytes) -> None:
        file.write(content)
        digest.update(content)

    for labels in batches:
        write(labels.rows.numpy().tobytes())
        said = identity.layout.unpack(labels.rows)
        mass = 1 - said.log_tail[:, at].double().exp()
        head_mass += float(mass.sum() if said.covered is None else mass[said.covered].sum())
        gold.append(labels.gold.numpy())
        progress(len(labels.rows))
    write(np.concatenate(gold).tobytes())
    return {"sha256": digest.hexdigest(), "head_mass": head_mass}


def tail_table(record: Recorder, shards: TokenShards, windows: np.ndarray, batch_rows: int) -> np.ndarray:
    """log of the mean probability of each token over all covered positions, float32 [temperatures, V]."""
    identity, chosen = record.identity, windows[evenly_spaced(len(windows), TABLE_WINDOWS)]
    totals = torch.zeros(len(identity.temperatures), identity.n_vocab, dtype=torch.float64, device=record.device)
    with torch.inference_mode():
        positions = sum(record.add_batch(totals, *read) for read in _reads(record, shards, chosen, batch_rows))
    mean = totals / max(1, positions)
    return mean.clamp_min(torch.finfo(torch.float32).tiny).log().float().cpu().numpy()


def _reads(
    record: Recorder, shards: TokenShards, windows: np.ndarray, rows: int
) -> Iterator[tuple[Batch, Aligned | None]]:
    """`windows` as the teacher will read them, `rows` at a time."""
    for start in range(0, len(windows), rows):
        batch = read_batch(shards, windows[start : start + rows], record.identity.seq_len)
        yield batch, record.align(batch)


def labelled(record: Recorder, shards: TokenShards, windows: np.ndarray, rows: int) -> Iterator[Labels]:
    """Labels of `windows` in main memory, `rows` windows at a time, non-finite ones refused.

    On CUDA a batch is read ahead in a thread, and one is handed out while the card is at work on the next.
    """
    reads, cuda = _reads(record, shards, windows, rows), record.device.type == "cuda"

    def sent() -> Iterator[tuple[Batch, Labels, torch.cuda.Event | None]]:
        for batch, aligned in ahead(reads) if cuda else reads:
            with torch.inference_mode():
                labels = _to_host(record.label(batch, aligned))
            yield batch, *labels

    for batch, labels, arrived in one_behind(sent()) if cuda else sent():
        if arrived is not None:
            arrived.synchronize()
        record.refuse_not_finite(labels, batch)
        yield labels


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The items in their order, each once the one after it has been taken from them."""
    for item, _ in pairwise(chain(items, [None])):
        yield item


def _to_host(labels: Labels) -> tuple[Labels, torch.cuda.Event | None]:
    """Labels in main memory; from CUDA they are there once the event is."""
    if labels.rows.device.type != "cuda":
        return labels, None
    pinned = (torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in labels)
    host = Labels(*(there.copy_(tensor, non_blocking=True) for there, tensor in zip(pinned, labels)))
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived


def ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as reader:
        end = object()
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item


def projected_loss(
    record: Recorder, shards: TokenShards, windows: np.ndarray, rows: int, byte_lengths: np.ndarray
) -> tuple[ValidationLoss, float]:
    """The loss of the projected distributions on the covered positions of `windows`, in bytes of the student's tokens.

    Args:
        byte_lengths: int [V].

    Returns:
        It, with the covered positions as its tokens, and the share of positions at a shared boundary.
    """
    shared = []

    def said() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for batch, aligned in _reads(record, shards, windows, rows):
            targets = batch.targets.numpy()
            with torch.inference_mode():
                gold = record.label(batch, aligned).gold.cpu().numpy()
            shared.append(aligned.shared)
            yield aligned.covered.reshape(targets.shape), gold.reshape(targets.shape), targets

    return loss_of_gold(windows, said(), byte_lengths), float(np.concatenate(shared).mean())
