"""Encoded documents to token shards, in a working folder that a run killed at any point goes on from.

The folder holds `shards/`, as they grow, and `progress.json`, which says how much of them counts: how far the corpus
had been read when a shard was last finished, and the lengths and hashes of all files at that moment.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from microlm.corpus.encoding import Encoded
from microlm.corpus.shards import FORMAT, HEADER, MAGIC, VERSION, Split, token_dtype
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sealed, sha256_file, sha256_json, write_json, write_sums

if TYPE_CHECKING:
    from microlm.corpus.sources import Position

PROGRESS = "progress.json"
COUNTS = ("documents", "tokens", "text_bytes")


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
        self._in_file = 0
        self._sha256 = hashlib.sha256()  # of the tokens in the open file

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
        self.tokens += len(document)
        self.text_bytes += text_bytes
        while len(document):
            if self._file is None:
                self._file, self._in_file, self._sha256 = open(self._path(), "wb"), 0, hashlib.sha256()
                self._file.write(bytes(HEADER.size))
            fits = document[: self._shard_tokens - self._in_file].tobytes()
            self._file.write(fits)
            self._sha256.update(fits)
            fitting = len(fits) // self._dtype.itemsize
            self._in_file += fitting
            document = document[fitting:]
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
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        unfinished = {"tokens": self._in_file, "sha256": self._sha256.hexdigest()} if self._file else None
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
        self._in_file = state["unfinished"]["tokens"]
        length = HEADER.size + self._in_file * self._dtype.itemsize
        path = self._path()
        if not path.is_file() or path.stat().st_size < length:
            raise ValueError(f"{path.name} has lost its end")
        os.truncate(path, length)  # what came after the state was saved comes again
        self._file = open(path, "r+b")
        self._file.seek(HEADER.size)
        while block := self._file.read(1 << 20):
            self._sha256.update(block)
        if self._sha256.hexdigest() != state["unfinished"]["sha256"]:
            raise ValueError(f"{path.name} is not as it was saved")

    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self.shards):05d}.bin"

    def _finish_shard(self) -> None:
        path = self._path()
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self._in_file))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.shards.append({"file": path.name, "tokens": self._in_file, "sha256": sha256_file(path)})


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
        from microlm.corpus.sources import Position  # which needs `datasets`: splits alone are written without

        self.position = Position()
        self._directory, self._tokenizer = directory, tokenizer
        self._shards = directory / "shards"
        self._shards.mkdir(exist_ok=True)
        self._train = SplitWriter(self._shards, "train", tokenizer, shard_tokens, train_tokens)
        self._val = SplitWriter(self._shards, "val", tokenizer, shard_tokens)
        if (directory / PROGRESS).exists():
            self._restore()

    def counts(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text written so far."""
        return tuple(getattr(self._train, key) + getattr(self._val, key) for key in COUNTS)

    def write(
        self, batches: "Iterable[tuple[Encoded, Position]]", progress: Callable[[int, int, int], None] | None = None
    ) -> None:
        """Append `batches`, which follow `position`, until they end or the training split is full.

        `progress` is called after each with the `counts`.
        """
        if self._train.full:
            return
        for batch, position in batches:
            finished = self._finished()
            self._write_batch(batch)
            self.position = position
            if self._finished() > finished:
                splits = {"train": self._train.state(), "val": self._val.state()}
                write_json(self._directory / PROGRESS, {"position": asdict(position), **splits})
            if progress:
                progress(*self.counts())
            if self._train.full:
                return

    def publish(self, target: Path, source: dict[str, Any]) -> dict[str, Any]:
        """Make the folder `target` of the shards, whole or not at all; returns its manifest.

        Args:
            source: what the manifest says about where the documents come from.

        Raises:
            UserError: a split is empty.
        """
        splits = {"train": self._train.close(), "val": self._val.close()}
        _refuse_empty(splits)
        tokenizer = {key: getattr(self._tokenizer, key) for key in ("name", "fingerprint", "n_vocab", "eot_id")}
        manifest = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer, "source": source, "splits": splits}
        manifest = sealed(manifest)
        with atomic_directory(target) as folder:
            for shard in (shard for split in splits.values() for shard in split["shards"]):
                try:
                    os.link(self._shards / shard["file"], folder / shard["file"])
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(self._shards / shard["file"], folder / shard["file"])
            self._tokenizer.save(folder / "tokenizer")
            write_sums(folder / "tokenizer")
            write_json(folder / "manifest.json", manifest)
        return manifest

    def _finished(self) -> int:
        return len(self._train.shards) + len(self._val.shards)

    def _write_batch(self, batch: Encoded) -> None:
        start = 0
        for end, text_bytes, validation in zip(batch.ends, batch.text_bytes, batch.validation, strict=True):
            (self._val if validation else self._train).write(batch.tokens[start:end], int(text_bytes))
            start = end
            if self._train.full:
                return

    def _restore(self) -> None:
        state = read_json(self._directory / PROGRESS, "tokenize")
        try:
            self._train.restore(state["train"])
            self._val.restore(state["val"])
            self.position = replace(self.position, **state["position"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._directory}: an interrupted tokenization is damaged ({error}); remove that folder to start over"
            ) from None


def _refuse_empty(splits: dict[str, dict[str, Any]]) -> None:
    documents = sum(split["documents"] for split in splits.values())
    for name, split in splits.items():
        if not split["tokens"]:
            mend = "give more documents or change corpus.validation_fraction"
            raise UserError(f"corpus: none of its {documents} documents fell into the {name} split; {mend}")
