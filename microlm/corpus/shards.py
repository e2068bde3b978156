"""Token shards: flat files of token ids, memory-mapped, with an end-of-text token before every document.

A file is a header of 256 bytes (magic "MICROLM1", format version, bytes a token, tokens; little endian) and then the
tokens: uint16 where the vocabulary allows, else uint32. `manifest.json`, written last, has the sha256 of each.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError
from microlm.files import atomic_directory, read_json, sha256_file, sha256_json, write_json

FORMAT = "microlm-shards"
VERSION = 1
MAGIC = b"MICROLM1"
HEADER = struct.Struct("<8sIIQ232x")  # magic, version, bytes a token, tokens: 256 bytes
SHARDS_DIRECTORY = Path("data/shards")
BATCH_DOCUMENTS = 1024
REMAKE = "make it again with: dvc repro -f -s tokenize"

Split = Literal["train", "val"]


def token_dtype(n_vocab: int) -> np.dtype:
    """The smallest unsigned type, little endian, that holds ids 0 .. n_vocab - 1."""
    return np.dtype("<u2") if n_vocab <= 2**16 else np.dtype("<u4")


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document: a function of its text alone, so that copies of it are never on both sides."""
    hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "val" if hashed < validation_fraction * 2**64 else "train"


class ShardWriter:
    """Writes one split into `directory`, a shard at a time; holds no more than one document in memory."""

    def __init__(
        self, directory: Path, split: Split, tokenizer: Tokenizer, shard_tokens: int, limit: int | None = None
    ) -> None:
        """`limit`: tokens after which the split is full; the last document is cut to fit."""
        self.documents = self.tokens = self.text_bytes = 0
        self._directory, self._split, self._tokenizer = directory, split, tokenizer
        self._shard_tokens, self._limit = shard_tokens, limit
        self._dtype = token_dtype(tokenizer.n_vocab)
        self._eot = np.array([tokenizer.eot_id], self._dtype)
        self._shards: list[dict[str, Any]] = []
        self._file = None
        self._in_file = 0

    @property
    def full(self) -> bool:
        return self._limit is not None and self.tokens >= self._limit

    def write(self, ids: np.ndarray) -> None:
        """Append one document: the end-of-text token, then `ids` [n]. Nothing is written once the split is full."""
        if self.full:
            return
        document = np.concatenate((self._eot, ids.astype(self._dtype)))
        if self._limit is not None:
            document = document[: self._limit - self.tokens]
        self.documents += 1
        self.tokens += len(document)
        self.text_bytes += int(self._tokenizer.byte_lengths[document].sum())
        while len(document):
            if self._file is None:
                self._open()
            fits = document[: self._shard_tokens - self._in_file]
            self._file.write(fits.tobytes())
            self._in_file += len(fits)
            document = document[len(fits) :]
            if self._in_file == self._shard_tokens:
                self._close_file()

    def _open(self) -> None:
        path = self._directory / f"{self._split}-{len(self._shards):05d}.bin"
        self._file, self._in_file = open(path, "wb"), 0
        self._file.write(bytes(HEADER.size))

    def _close_file(self) -> None:
        path = Path(self._file.name)
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self._in_file))
        self._file.close()
        self._file = None
        self._shards.append({"file": path.name, "tokens": self._in_file, "sha256": sha256_file(path)})

    def close(self) -> dict[str, Any]:
        """Finish the last shard; returns the split's entry in the manifest."""
        if self._file is not None:
            self._close_file()
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "digest": sha256_json([shard["sha256"] for shard in self._shards]),
            "shards": self._shards,
        }


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, BATCH_DOCUMENTS)):
        yield batch


def write_shards(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    target: Path,
    source: dict[str, Any],
    *,
    validation_fraction: float,
    shard_tokens: int,
    train_tokens: int | None = None,
    threads: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> dict[str, Any]:
    """Tokenize `documents` into the shard folder `target`, whole or not at all; returns its manifest.

    Args:
        source: what the manifest says about where the documents come from.
        train_tokens: stop once the training split has this many tokens; None reads everything.
        progress: called after each batch with the documents, tokens and bytes of text written so far.

    Raises:
        UserError: a split would be empty.
    """
    with atomic_directory(target) as directory:
        train = ShardWriter(directory, "train", tokenizer, shard_tokens, train_tokens)
        val = ShardWriter(directory, "val", tokenizer, shard_tokens)
        for batch in _batches(documents):
            for text, ids in zip(batch, tokenizer.encode_batch(batch, threads), strict=True):
                (val if split_of(text, validation_fraction) == "val" else train).write(ids)
                if train.full:
                    break
            if progress:
                progress(*(getattr(train, key) + getattr(val, key) for key in ("documents", "tokens", "text_bytes")))
            if train.full:
                break
        splits = {"train": train.close(), "val": val.close()}
        _refuse_empty(splits)
        tokenizer.save(directory / "tokenizer")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "n_vocab", "eot_id")},
            "source": source,
            "splits": splits,
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def _refuse_empty(splits: dict[str, dict[str, Any]]) -> None:
    documents = sum(split["documents"] for split in splits.values())
    for name, split in splits.items():
        if not split["tokens"]:
            mend = "give more documents or change corpus.validation_fraction"
            raise UserError(f"corpus: none of its {documents} documents fell into the {name} split; {mend}")


class TokenShards:
    """One split, read-only and memory-mapped, checked against the manifest when it is opened.

    Attributes:
        split: its name.
        n_tokens: tokens in the split.
        dtype: of the stored tokens.
        digest: sha256 over the shards' sha256s, the identity of the split.
        manifest: the folder's whole manifest.
    """

    def __init__(self, directory: Path, split: Split) -> None:
        """Raises UserError naming the file and the check that failed."""
        directory = Path(directory)
        self.split = split
        self.manifest = read_json(directory / "manifest.json", "tokenize")
        if (self.manifest.get("format"), self.manifest.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{directory / 'manifest.json'}: not {FORMAT} version {VERSION}; {REMAKE}")
        entry = self.manifest["splits"][split]
        self.dtype = token_dtype(self.manifest["tokenizer"]["n_vocab"])
        self._shards = [_open_shard(directory / shard["file"], shard, self.dtype) for shard in entry["shards"]]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.n_tokens = int(self._ends[-1])
        self.digest: str = entry["digest"]
        if (
            self.digest != sha256_json([shard["sha256"] for shard in entry["shards"]])
            or self.n_tokens != entry["tokens"]
        ):
            raise UserError(
                f"{directory / 'manifest.json'}: digest or token count of {split} is not that of its shards; {REMAKE}"
            )

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1, [length] of `dtype`. IndexError outside the split."""
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise IndexError(f"tokens {start}..{start + length} of a split of {self.n_tokens}")
        pieces = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while length > 0:
            begin = start - (self._ends[shard] - len(self._shards[shard]))
            pieces.append(self._shards[shard][begin : begin + length])
            start += len(pieces[-1])
            length -= len(pieces[-1])
            shard += 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of `starts` [n]: [n, length] int64."""
        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, starts, strict=True):
            row[:] = self.read(int(start), length)
        return out


def _open_shard(path: Path, entry: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    """Memory-map a shard after checking its size, header and sha256 against its entry in the manifest."""
    if not path.is_file():
        raise UserError(f"{path} is not there; {REMAKE}")
    tokens = entry["tokens"]
    expected = HEADER.size + tokens * dtype.itemsize
    if path.stat().st_size != expected:
        raise UserError(f"{path}: {path.stat().st_size} bytes long, expected {expected}; {REMAKE}")
    with open(path, "rb") as file:
        header = HEADER.unpack(file.read(HEADER.size))
    if header != (MAGIC, VERSION, dtype.itemsize, tokens):
        raise UserError(f"{path}: its header is not that of a shard of {tokens} {dtype} tokens; {REMAKE}")
    if sha256_file(path) != entry["sha256"]:
        raise UserError(f"{path}: its sha256 is not the manifest's; {REMAKE}")
    return np.memmap(path, dtype, "r", offset=HEADER.size, shape=(tokens,))
