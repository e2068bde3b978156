"""Documents to shards, end to end, by 1 and by more processes, on the packaged corpus.

    python -m bench.tokenize_workers [--workers 1 2] [--rounds 3] [--copies 8]

The corpus is in memory, `--copies` times over, so that starting the processes does not decide; each count's best round
is shown, and the rounds alternate. The seconds of CPU of the process that hands out and writes say how many others it
can feed, on a busy machine too. Needs data/parts (dvc repro fetch).
"""

import argparse
import tempfile
import time
from pathlib import Path

from microlm.corpus.sources import Documents, batches
from microlm.corpus.tokenizer import Tokenizer, build_tokenizer
from microlm.corpus.writing import ShardWriter, encoded
from microlm.errors import run_stage
from microlm.parameters import CorpusConfig


def measure(
    texts: list[Documents], corpus: CorpusConfig, tokenizer: Tokenizer, workers: int
) -> tuple[float, float, float]:
    """Megabytes of text, seconds that they took, and seconds of CPU of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        writer = ShardWriter(Path(folder), tokenizer, corpus.shard_tokens)
        started, started_cpu = time.perf_counter(), time.process_time()
        writer.write(encoded(texts, tokenizer, corpus.validation_fraction, workers))
        return writer.counts()[2] / 1e6, time.perf_counter() - started, time.process_time() - started_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=8)
    options = parser.parse_args()
    corpus = CorpusConfig("packaged", "smollm2", validation_fraction=0.04, train_tokens=None, shard_tokens=1_000_000)
    tokenizer = build_tokenizer(corpus.tokenizer)
    texts = list(batches(corpus)) * options.copies
    rounds = [
        (workers, *measure(texts, corpus, tokenizer, workers))
        for _ in range(options.rounds)
        for workers in options.workers
    ]
    for workers in options.workers:
        _, megabytes, wall_s, cpu_s = min((r for r in rounds if r[0] == workers), key=lambda r: r[2])
        print(
            f"workers {workers}  {megabytes / wall_s:6.2f} MB/s  {wall_s:6.1f} s for {megabytes:.1f} MB, "
            f"of which {cpu_s:5.1f} s of CPU in the process that hands out and writes"
        )


if __name__ == "__main__":
    run_stage(main)
