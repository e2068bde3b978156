"""Token shards: flat files of token ids, memory-mapped, with an end-of-text token before every document.

A file is a header of 256 bytes (magic "MICROLM1", format version, bytes a token, tokens; little endian) and then the
tokens: uint16 where the vocabulary allows, else uint32. `manifest.json`, written last, has the sha256 of each.
"""

import hashlib
import struct
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from microlm.errors import UserError
from microlm.files import read_json, refuse_unsealed, sha256_file, sha256_json

FORMAT = "microlm-shards"
VERSION = 1
MAGIC = b"MICROLM1"
HEADER = struct.Struct("<8sIIQ232x")  # magic, version, bytes a token, tokens: 256 bytes

Split = Literal["train", "val", "outside"]


def token_dtype(n_vocab: int) -> np.dtype:
    """The smallest unsigned type, little endian, that holds ids 0 .. n_vocab - 1."""
    return np.dtype("<u2") if n_vocab <= 2**16 else np.dtype("<u4")


def split_of(text: str, validation_fraction: float) -> Split:
    """The split of a document: a function of its text alone, so that copies of it are never on both sides."""
    hashed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return "val" if hashed < validation_fraction * 2**64 else "train"


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
        path = Path(directory) / "manifest.json"
        stage = "outside" if split == "outside" else "tokenize"
        remake = f"make it again with: dvc repro -f -s {stage}"
        self.split, self.manifest = split, read_json(path, stage)
        refuse_unsealed(self.manifest, path, remake)
        if (self.manifest.get("format"), self.manifest.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{path}: not {FORMAT} version {VERSION}; {remake}")
        if split not in self.manifest["splits"]:
            raise UserError(f"{path}: has no split {split}; {remake}")
        entry = self.manifest["splits"][split]
        self.dtype = token_dtype(self.manifest["tokenizer"]["n_vocab"])
        self._shards = [_open_shard(path.with_name(of["file"]), of, self.dtype, remake) for of in entry["shards"]]
        *self._begins, self.n_tokens = accumulate(map(len, self._shards), initial=0)
        self.digest: str = entry["digest"]
        digest = sha256_json([shard["sha256"] for shard in entry["shards"]])
        if (self.digest, entry["tokens"]) != (digest, self.n_tokens):
            raise UserError(f"{path}: digest or token count of {split} is not that of its shards; {remake}")

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start + length - 1, [length] of `dtype`. IndexError outside the split."""
        end = start + length
        if not 0 <= start <= end <= self.n_tokens:
            raise IndexError(f"tokens {start}..{end} of a split of {self.n_tokens}")
        first, last = bisect_right(self._begins, start) - 1, bisect_right(self._begins, end)
        touched = zip(self._begins[first:last], self._shards[first:last])
        return np.concatenate([shard[max(0, start - begin) : end - begin] for begin, shard in touched])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of `starts` [n]: [n, length] int64."""
        return np.array([self.read(int(start), length) for start in starts], np.int64).reshape(len(starts), length)


def _open_shard(path: Path, entry: dict[str, Any], dtype: np.dtype, remake: str) -> np.ndarray:
    """Memory-map a shard after checking its size, header and sha256 against its entry in the manifest."""
    if not path.is_file():
        raise UserError(f"{path} is not there; {remake}")
    tokens, size = entry["tokens"], path.stat().st_size
    expected = HEADER.size + tokens * dtype.itemsize
    if size != expected:
        raise UserError(f"{path}: {size} bytes long, expected {expected}; {remake}")
    with open(path, "rb") as file:
        header = HEADER.unpack(file.read(HEADER.size))
    if header != (MAGIC, VERSION, dtype.itemsize, tokens):
        raise UserError(f"{path}: its header is not that of a shard of {tokens} {dtype} tokens; {remake}")
    if sha256_file(path) != entry["sha256"]:
        raise UserError(f"{path}: its sha256 is not the manifest's; {remake}")
    return np.memmap(path, dtype, "r", offset=HEADER.size, shape=(tokens,))
