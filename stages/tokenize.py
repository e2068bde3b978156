"""Stream the corpus through the tokenizer into token shards -> data/shards/, metrics/tokenize.json."""

import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from microlm.config import load_config
from microlm.corpus.shards import SHARDS_DIRECTORY, write_shards
from microlm.corpus.sources import describe, documents
from microlm.corpus.tokenizer import AWKWARD_TEXTS, build_tokenizer
from microlm.errors import run_stage
from microlm.files import write_json

METRICS = Path("metrics/tokenize.json")
CHECKED_DOCUMENTS = 500
COUNTS = ("documents", "tokens", "text_bytes")


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    splits = {name: {key: split[key] for key in COUNTS} for name, split in manifest["splits"].items()}
    total = {key: sum(split[key] for split in splits.values()) for key in COUNTS}
    return {**total, "bytes_per_token": total["text_bytes"] / total["tokens"], **splits}


def main() -> None:
    config = load_config()
    corpus, threads = config.at.corpus, config.at.runtime.threads
    started = time.perf_counter()
    tokenizer = build_tokenizer(corpus.tokenizer)
    tokenizer.check(AWKWARD_TEXTS)
    tokenizer.check(islice(documents(corpus), CHECKED_DOCUMENTS))
    with tqdm(unit="B", unit_scale=True, desc="tokenize", disable=None, leave=False) as bar:

        def progress(n_documents: int, n_tokens: int, n_bytes: int) -> None:
            bar.set_postfix(documents=n_documents, tokens=n_tokens, refresh=False)
            bar.update(n_bytes - bar.n)

        manifest = write_shards(
            documents(corpus),
            tokenizer,
            SHARDS_DIRECTORY,
            describe(corpus),
            validation_fraction=corpus.validation_fraction,
            shard_tokens=corpus.shard_tokens,
            train_tokens=corpus.train_tokens,
            threads=os.cpu_count() or 1 if threads == "auto" else threads,
            progress=progress,
        )
    metrics = summary(manifest)
    write_json(METRICS, {**metrics, "elapsed_s": round(time.perf_counter() - started, 1)})
    train, val = (metrics[split]["tokens"] for split in ("train", "val"))
    print(f"tokenize: {metrics['documents']:,} documents, {train:,} training and {val:,} validation tokens")


if __name__ == "__main__":
    run_stage(main)
