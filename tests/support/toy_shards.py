"""Shards of a few texts, without a corpus on the disk."""

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from microlm.corpus.sources import Documents, Position
from microlm.corpus.tokenizer import Tokenizer
from microlm.corpus.writing import ShardWriter, encoded

BATCH_DOCUMENTS = 5  # small, so that other processes are started for a few documents


def batches_of(texts: Iterable[str], start: Position | None = None) -> Iterator[Documents]:
    """`texts` as one file of a corpus."""
    row = start.row if start else 0
    rest = islice(texts, row, None)
    while batch := list(islice(rest, BATCH_DOCUMENTS)):
        row += len(batch)
        yield Documents(batch, Position(0, row))


def write_shards(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    target: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
    train_tokens: int | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Make the shard folder `target`; returns its manifest."""
    with tempfile.TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory), tokenizer, shard_tokens, train_tokens)
        writer.write(encoded(batches_of(texts), tokenizer, validation_fraction, workers))
        return writer.publish(target, {"source": "test"})
