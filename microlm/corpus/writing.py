"""Encoded documents to token shards, in a working folder that a run killed at any point goes on from.

The folder holds `shards/`, as they grow, and `progress.json`, which says how much of them counts: how far the corpus
had been read when a shard was last finished, and the lengths and hashes of all files at that moment.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from microlm.corpus.encoding import Encoded
from microlm.corpus.shards import FORMAT, HEADER, MAGIC, VERSION, Split, token_dtype
from microlm.corpus.sources import BEGINNING, Position
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sealed, sha256_file, sha256_json, write_json, write_sums

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
        if self._file is not None:
            self._flush()
        unfinished = self._sha256_of_tokens() if self._file else None
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
        os.truncate(self._path, length)  # what came after the state was saved comes again
        if self._sha256_of_tokens() != state["unfinished"]:
            raise ValueError(f"{self._path.name} is not as it was saved")
        self._file = open(self._path, "r+b")
        self._file.seek(length)

    @property
    def _path(self) -> Path:
        return self._directory / f"{self._split}-{len(self.shards):05d}.bin"

    @property
    def _in_file(self) -> int:
        """Tokens in the open file."""
        return self.tokens - len(self.shards) * self._shard_tokens

    def _sha256_of_tokens(self) -> str:
        """Of the open file without its header, which is written last."""
        with open(self._path, "rb") as file:
            file.seek(HEADER.size)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _finish_shard(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self._in_file))
        self._flush()
        self._file.close()
        self._file = None
        shard = {"file": self._path.name, "tokens": self._in_file, "sha256": sha256_file(self._path)}
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
            self._restore()

    def counts(self) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text written so far."""
        return tuple(getattr(self._train, key) + getattr(self._val, key) for key in COUNTS)

    def write(self, batches: Iterable[tuple[Encoded, Position]], bar: tqdm | None = None) -> None:
        """Append `batches`, which follow `position`, until they end or the training split is full."""
        if self._train.full:
            return
        for batch, position in batches:
            finished = len(self._train.shards + self._val.shards)
            self._write_batch(batch)
            self.position = position
            if len(self._train.shards + self._val.shards) > finished:
                splits = {name: split.state() for name, split in self._splits.items()}
                write_json(self._directory / PROGRESS, {"position": asdict(position), **splits})
            if bar is not None:
                documents, tokens, text_bytes = self.counts()
                bar.set_postfix(documents=documents, tokens=tokens, refresh=False)
                bar.update(text_bytes - bar.n)
            if self._train.full:
                return

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
        manifest = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer, "source": source, "splits": splits}
        manifest = sealed(manifest)
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

    def _write_batch(self, batch: Encoded) -> None:
        documents = np.split(batch.tokens, batch.ends[:-1])
        for document, text_bytes, validation in zip(documents, batch.text_bytes, batch.validation, strict=True):
            (self._val if validation else self._train).write(document, int(text_bytes))
            if self._train.full:
                return

    def _restore(self) -> None:
        state = read_json(self._directory / PROGRESS, "tokenize")
        try:
            for name, split in self._splits.items():
                split.restore(state[name])
            self.position = Position(**state["position"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._directory}: an interrupted tokenization is damaged ({error}); remove that folder to start over"
            ) from None
