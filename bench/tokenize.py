"""Tokenizing speed, one thread: ours against the Hugging Face fast tokenizer, on the whole packaged corpus.

    python -m bench.tokenize [--tokenizer smollm2|gpt2|olmo] [--rounds 3]

Each tokenizer's best round counts; the rounds alternate, so that a busy machine slows both. Ours gives arrays, the
other its ids as a list, the form in which it hands them out. Needs data/parts (dvc repro fetch).
"""

import argparse
import time
from collections.abc import Callable, Sequence

from microlm.corpus.sources import documents
from microlm.corpus.tokenizer import build_tokenizer
from microlm.errors import run_stage
from microlm.parameters import CorpusConfig


def timed(encode: Callable[[], list[Sequence[int]]]) -> tuple[float, list[Sequence[int]]]:
    """Seconds that `encode` took, and the ids of each document."""
    started = time.perf_counter()
    ids = encode()
    return time.perf_counter() - started, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    corpus = CorpusConfig("packaged", options.tokenizer, validation_fraction=0.04, train_tokens=None, shard_tokens=1024)
    texts = list(documents(corpus))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = build_tokenizer(options.tokenizer)
    reference = tokenizer.reference
    ours_s, theirs_s = [], []
    for _ in range(options.rounds):
        seconds, ours = timed(lambda: tokenizer.encode_batch(texts))
        ours_s.append(seconds)
        seconds, theirs = timed(lambda: [reference.encode(text, add_special_tokens=False).ids for text in texts])
        theirs_s.append(seconds)
    identical = sum(a.tolist() == b for a, b in zip(ours, theirs, strict=True))
    print(f"corpus     {len(texts):,} documents, {megabytes:.2f} MB, {sum(map(len, ours)):,} {tokenizer.name} tokens")
    print(f"MicroLM    {megabytes / min(ours_s):6.2f} MB/s")
    print(f"tokenizers {megabytes / min(theirs_s):6.2f} MB/s")
    print(f"ratio      {min(theirs_s) / min(ours_s):6.2f}")
    print(f"identical ids in {identical:,} of {len(texts):,} documents")


if __name__ == "__main__":
    run_stage(main)
