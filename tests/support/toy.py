"""A toy corpus: shards without text or tokenizer, for tests of what reads them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from microlm.corpus.shards import FORMAT, VERSION, TokenShards, token_dtype
from microlm.corpus.writing import SplitWriter
from microlm.files import write_json


def toy_shards(directory: Path, n_vocab: int, tokens: int, split: str = "train") -> TokenShards:
    """A split of `tokens` tokens of a noisy cycle, in shards of 256."""
    tokenizer = SimpleNamespace(
        name="toy", fingerprint="toy", n_vocab=n_vocab, eot_id=0, byte_lengths=np.ones(n_vocab, np.int32)
    )
    generator = np.random.Generator(np.random.PCG64(len(split)))
    ids = (np.arange(tokens) * 3 + generator.integers(0, 3, tokens)) % n_vocab
    document = np.concatenate(([tokenizer.eot_id], ids)).astype(token_dtype(n_vocab))
    writer = SplitWriter(directory, split, tokenizer, 256)
    writer.write(document, len(document))
    described = {"name": "toy", "fingerprint": "toy", "n_vocab": n_vocab, "eot_id": 0}
    write_json(
        directory / "manifest.json",
        {"format": FORMAT, "version": VERSION, "tokenizer": described, "source": {}, "splits": {split: writer.close()}},
    )
    return TokenShards(directory, split)
