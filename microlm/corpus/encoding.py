"""Documents to tokens, in processes of their own where more than one is allowed, in the order in which they came."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from microlm.corpus.shards import split_of, token_dtype
from microlm.corpus.sources import Documents, Position
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import UserError

FEW = 16  # batches: encoded here sooner than other processes would have started
AHEAD = 2  # batches that wait for each process, so that none waits for the reader


@dataclass(frozen=True)
class Encoded:
    """Documents as the shards hold them, each with the end-of-text token before it."""

    tokens: np.ndarray  # [tokens of all] of the shards' dtype
    ends: np.ndarray  # int64 [documents], where each ends in `tokens`
    text_bytes: np.ndarray  # int64 [documents]
    validation: np.ndarray  # bool [documents]


def encode(texts: list[str], tokenizer: Tokenizer, validation_fraction: float) -> Encoded:
    """Encode at least one document."""
    eot = np.array([tokenizer.eot_id], np.uint32)
    ids = tokenizer.encode_batch(texts)
    tokens = np.concatenate([piece for document in ids for piece in (eot, document)])
    ends = np.cumsum([1 + len(document) for document in ids])
    starts = np.concatenate(([0], ends[:-1]))
    return Encoded(
        tokens.astype(token_dtype(tokenizer.n_vocab)),
        ends,
        np.add.reduceat(tokenizer.byte_lengths[tokens], starts, dtype=np.int64),
        np.array([split_of(text, validation_fraction) == "val" for text in texts]),
    )


def encoded(
    batches: Iterable[Documents], tokenizer: Tokenizer, validation_fraction: float, workers: int
) -> Iterator[tuple[Encoded, Position]]:
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


def _encode_here(texts: list[str]) -> Encoded:
    return encode(texts, _tokenizer, _validation_fraction)
