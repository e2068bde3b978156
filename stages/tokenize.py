"""Stream the corpus through the tokenizer into token shards -> data/shards/, metrics/tokenize.json."""

import os
import time
from dataclasses import asdict
from itertools import islice
from typing import Any

from tqdm import tqdm

from microlm.config import load_config
from microlm.corpus import sources, tokenizer, writing
from microlm.errors import end_at_once, run_stage
from microlm.files import write_json
from microlm.runtime.paths import METRICS, SHARDS
from microlm.runtime.resume import resumable, stage_code

CHECKED_DOCUMENTS = 500


def summary(manifest: dict[str, Any]) -> dict[str, Any]:
    splits = {name: {key: split[key] for key in writing.COUNTS} for name, split in manifest["splits"].items()}
    total = {key: sum(split[key] for split in splits.values()) for key in writing.COUNTS}
    return {**total, "bytes_per_token": total["text_bytes"] / total["tokens"], **splits}


def main() -> None:
    config = load_config()
    corpus, threads = config.at.corpus, config.at.runtime.threads
    if corpus.source == "hub":  # where pyarrow waits for it no handler would run
        end_at_once(lambda: "finished shards are kept in .resume")
    started = time.perf_counter()
    encoder = tokenizer.build_tokenizer(corpus.tokenizer)
    source = sources.describe(corpus)
    inputs = [asdict(corpus), source, encoder.fingerprint, stage_code("tokenize")]
    with resumable("tokenize", inputs) as directory, tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:
        writer = writing.ShardWriter(directory, encoder, corpus.shard_tokens, corpus.train_tokens)
        if not writer.counts()[0]:
            encoder.check(tokenizer.AWKWARD_TEXTS)
            encoder.check(islice(sources.documents(corpus), CHECKED_DOCUMENTS))
        else:
            print("tokenize: goes on behind {:,} documents, {:,} tokens".format(*writer.counts()), flush=True)
        rest = sources.batches(corpus, start=writer.position)
        workers = os.cpu_count() or 1 if threads == "auto" else threads
        writer.write(writing.encoded(rest, encoder, corpus.validation_fraction, workers), bar)
        metrics = summary(writer.publish(SHARDS, source)) | {"empty_rows": writer.position.empty}
        write_json(METRICS / "tokenize.json", {**metrics, "elapsed_s": round(time.perf_counter() - started, 1)})
    train, val = (metrics[split]["tokens"] for split in ("train", "val"))
    skipped = f", {metrics['empty_rows']:,} rows without text left out" * bool(metrics["empty_rows"])
    print(f"tokenize: {metrics['documents']:,} documents{skipped}, {train:,} training and {val:,} validation tokens")


if __name__ == "__main__":
    run_stage(main)
