"""Documents to token shards: encoded in processes of their own where more than one is allowed, written in order.

The working folder, which a run killed at any point goes on from, holds `shards/`, as they grow, and `progress.json`,
which says how much of them counts: how far the corpus had been read when a shard was last finished, and the lengths and
hashes of all files at that moment.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from microlm.corpus.shards import FORMAT, HEADER, MAGIC, VERSION, Split, split_of, token_dtype
from microlm.corpus.sources import BEGINNING, Documents, Position
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sealed, sha256_file, sha256_json, write_json, write_sums

FEW = 16  # batches: encoded here sooner than other processes would have started
AHEAD = 2  # batches that wait for each process, so that none waits for the reader
PROGRESS = "progress.json"
COUNTS = ("documents", "tokens", "text_bytes")


class Encoded(NamedTuple):
    """A document as the shards hold it, with the end-of-text token before it."""

    tokens: np.ndarray  # [n] of the shards' dtype
    text_bytes: int
    split: Split


def encode(texts: list[str], tokenizer: Tokenizer, validation_fraction: float) -> list[Encoded]:
    found = []
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        tokens = np.append(tokenizer.eot_id, ids).astype(token_dtype(tokenizer.n_vocab))
        found.append(Encoded(tokens, int(tokenizer.byte_lengths[ids].sum()), split_of(text, validation_fraction)))
    return found


def encoded(
    batches: Iterable[Documents], tokenizer: Tokenizer, validation_fraction: float, workers: int
) -> Iterator[tuple[list[Encoded], Position]]:
    """Each batch, encoded, with the position behind it; the same whatever the number of `workers`, at least 1.

    Raises:
        UserError: a worker was killed.
    """
    batches = iter(batches)
    first = list(islice(batches, FEW if workers > 1 else 0))
    if len(first) < FEW:
        for batch in chain(first, batches):
            yield encode(batch.texts, tokenizer, validation_fraction), batch.after
        return
    # not by fork: the reader has threads, whose locks a child would inherit as they stand
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, validation_fraction))
    submitted = ((pool.submit(_encode_here, batch.texts), batch.after) for batch in chain(first, batches))
    try:
        waiting = deque(islice(submitted, AHEAD * workers))
        while waiting:
            waiting.extend(islice(submitted, 1))
            future, after = waiting.popleft()
            yield future.result(), after
    except BrokenProcessPool:
        raise UserError(
            "tokenize: one of its processes was killed, as the system does where memory is short; lower "
            "runtime.threads, then run the same command again: it goes on from the last finished shard"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer: Tokenizer, validation_fraction: float) -> None:
    global _tokenizer, _validation_fraction
    _tokenizer, _validation_fraction = tokenizer, validation_fraction
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a killed parent closes nothing: its workers hold both ends of the pipe that they would wait at
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_here(texts: list[str]) -> list[Encoded]:
    return encode(texts, _tokenizer, _validation_fraction)


class SplitWriter:
    """Appends documents to the shards of one split; `limit`: tokens after which the split is full."""

    def __init__(
        self, directory: Path, split: Split, tokenizer: Tokenizer, shard_tokens: int, limit: int | None = None
    ) -> None:
        self.documents = self.tokens = self.text_bytes = 0
        self.shards: list[dict[str, Any]] = []
        """Those that are finished, as the manifest lists them."""
        self._directory, self._split, self._shard_tokens, self._limit = directory, split, shard_tokens, limit
        self._byte_lengths, self._dtype = tokenizer.byte_lengths, token_dtype(tokenizer.n_vocab)
        self._file: IO[bytes] | None = None

    @property
    def full(self) -> bool:
        return self._limit is not None and self.tokens >= self._limit

    def write(self, document: np.ndarray, text_bytes: int) -> None:
        """Append one document [n], cut where the split is full; nothing is written once it is."""
        if self.full:
            return
        if self._limit is not None and len(document) > self._limit - self.tokens:
            document = document[: self._limit - self.tokens]
            text_bytes = int(self._byte_lengths[document].sum())
        self.documents += 1
        self.text_bytes += text_bytes
        while len(document):
            if self._file is None:
                self._file = open(self._path, "wb")
                self._file.write(bytes(HEADER.size))
            fitting = document[: self._shard_tokens - self._in_file]
            self._file.write(fitting.tobytes())
            self.tokens += len(fitting)
            document = document[len(fitting) :]
            if self._in_file == self._shard_tokens:
                self._finish_shard()

    def close(self) -> dict[str, Any]:
        """Finish the last shard; returns the split's entry in the manifest."""
        if self._file is not None:
            self._finish_shard()
        digest = sha256_json([shard["sha256"] for shard in self.shards])
        return {**{key: getattr(self, key) for key in COUNTS}, "digest": digest, "shards": self.shards}

    def state(self) -> dict[str, Any]:
        """What `restore` needs, of files that are on the disk by then."""
        unfinished = self._sha256_on_disk() if self._file else None
        return {**{key: getattr(self, key) for key in COUNTS}, "shards": self.shards, "unfinished": unfinished}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned. ValueError names the first file that is not as it says."""
        for key in (*COUNTS, "shards"):
            setattr(self, key, state[key])
        for shard in self.shards:
            path = self._directory / shard["file"]
            if not path.is_file() or sha256_file(path) != shard["sha256"]:
                raise ValueError(f"{path.name} is not as it was finished")
        if state["unfinished"] is None:
            return
        length = HEADER.size + self._in_file * self._dtype.itemsize
        if not self._path.is_file() or self._path.stat().st_size < length:
            raise ValueError(f"{self._path.name} has lost its end")
        self._file = open(self._path, "r+b")
        self._file.truncate(length)  # what came after the state was saved, the header too, comes again
        self._file.write(bytes(HEADER.size))
        if self._sha256_on_disk() != state["unfinished"]:
            raise ValueError(f"{self._path.name} is not as it was saved")
        self._file.seek(length)

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self.shards):05d}.bin"

    @property
    def _in_file(self) -> int:
        """Tokens in the open file."""
        return self.tokens - len(self.shards) * self._shard_tokens

    def _sha256_on_disk(self) -> str:
        """Of the open file, all of which is on the disk by then."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return sha256_file(self._path)

    def _finish_shard(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self._in_file))
        shard = {"file": self._path.name, "tokens": self._in_file, "sha256": self._sha256_on_disk()}
        self._file.close()
        self._file = None
        self.shards.append(shard)


class ShardWriter:
    """Both splits of a corpus, in `directory`. A second one on the same folder goes on where the first was killed.

    Attributes:
        position: how far the corpus has been read.
    """

    def __init__(
        self, directory: Path, tokenizer: Tokenizer, shard_tokens: int, train_tokens: int | None = None
    ) -> None:
        """`train_tokens`: tokens of the training split after which no more is written; None takes everything.

        Raises:
            UserError: a file of `directory` is damaged.
        """
        self.position = BEGINNING
        self._directory, self._tokenizer, self._shards = directory, tokenizer, directory / "shards"
        self._shards.mkdir(exist_ok=True)
        self._train = SplitWriter(self._shards, "train", tokenizer, shard_tokens, train_tokens)
        self._val = SplitWriter(self._shards, "val", tokenizer, shard_tokens)
        self._splits = {"train": self._train, "val": self._val}
        if (directory / PROGRESS).exists():
            state = read_json(directory / PROGRESS, "tokenize")
            try:
                for name, split in self._splits.items():
                    split.restore(state[name])
                self.position = Position(**state["position"])
            except (KeyError, TypeError, ValueError) as error:
                told = f"an interrupted tokenization is damaged ({error}); remove that folder to start over"
                raise UserError(f"{directory}: {told}") from None

    def counts(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text written so far."""
        return tuple(getattr(self._train, key) + getattr(self._val, key) for key in COUNTS)

    def write(self, batches: Iterable[tuple[list[Encoded], Position]], bar: tqdm | None = None) -> None:
        """Append `batches`, which follow `position`, until they end or the training split is full."""
        rest = iter(batches)
        while not self._train.full and (found := next(rest, None)):
            batch, self.position = found
            finished = len(self._train.shards + self._val.shards)
            for document in batch:
                self._splits[document.split].write(document.tokens, document.text_bytes)
                if self._train.full:
                    break
            if len(self._train.shards + self._val.shards) > finished:
                splits = {name: split.state() for name, split in self._splits.items()}
                write_json(self._directory / PROGRESS, {"position": asdict(self.position), **splits})
            if bar is not None:
                documents, tokens, text_bytes = self.counts()
                bar.set_postfix(documents=documents, tokens=tokens, refresh=False)
                bar.update(text_bytes - bar.n)

    def publish(self, target: Path, source: dict[str, Any]) -> dict[str, Any]:
        """Make the folder `target` of the shards, whole or not at all; returns its manifest.

        Args:
            source: what the manifest says about where the documents come from.

        Raises:
            UserError: a split is empty.
        """
        splits = {name: split.close() for name, split in self._splits.items()}
        for name, split in splits.items():
            if not split["tokens"]:
                told = f"none of its {self.counts()[0]} documents fell into the {name} split"
                raise UserError(f"corpus: {told}; give more documents or change corpus.validation_fraction")
        tokenizer = {key: getattr(self._tokenizer, key) for key in ("name", "fingerprint", "n_vocab", "eot_id")}
        known = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer}
        manifest = sealed({**known, "source": source, "splits": splits})
        with atomic_directory(target) as folder:
            for name in (shard["file"] for split in splits.values() for shard in split["shards"]):
                try:
                    os.link(self._shards / name, folder / name)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(self._shards / name, folder / name)
            self._tokenizer.save(folder / "tokenizer")
            write_sums(folder / "tokenizer")
            write_json(folder / "manifest.json", manifest)
        return manifest
