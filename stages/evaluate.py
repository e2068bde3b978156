"""Score one model on the benchmarks and on validation text.

data/evaluation/<model>/ gets a row for each question and window, metrics/evaluation/<model>.json the figures.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from microlm import distributed
from microlm.config import Config, load_config
from microlm.console import progress_bar
from microlm.corpus.batches import window_count
from microlm.corpus.shards import SHARDS_DIRECTORY, TokenShards
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import UserError
from microlm.evaluation import METRICS_DIRECTORY, MODELS, SCORES_DIRECTORY
from microlm.evaluation.benchmarks import configured_benchmarks
from microlm.evaluation.models import Candidate, load_pipeline_model
from microlm.evaluation.results import model_slug
from microlm.evaluation.run import evaluate, gather, refuse_overlong_shots
from microlm.evaluation.validation import ValidationLoss, validation_loss
from microlm.files import atomic_directory, write_json, write_sums
from microlm.launcher import run_shared_stage
from microlm.runtime import set_up
from microlm.scratch import scratch
from microlm.teacher.projected import native_loss
from microlm.teacher.projection import Projection


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        raise UserError(f"stages.evaluate: name one of {', '.join(MODELS)}, e.g. python -m stages.evaluate student")
    name, config, started = sys.argv[1], load_config(), time.monotonic()
    runtime = set_up(config.at.runtime)
    candidate = load_pipeline_model(name, config, runtime.dtype)
    candidate.model.to(runtime.device)
    metrics: dict[str, Any] = {"model": name, "parameters": candidate.parameters}
    # a benchmark that an interrupted run finished is taken from here: each says which weights and questions it is of
    with scratch(f"evaluate@{name}", candidate.weights) as done:
        metrics["tasks"], loss = _benchmarks(candidate, config, done), _validation(candidate, config)
        if not distributed.is_first():
            return
        with atomic_directory(SCORES_DIRECTORY / name) as folder:
            for file in (done / model_slug(name)).iterdir():
                shutil.copy(file, folder)
            table = pd.DataFrame({"window": loss.windows, "nats": loss.window_nats, "bytes": loss.window_bytes})
            table.to_parquet(folder / "windows.parquet", index=False)
            write_sums(folder)
    metrics["validation"] = {"nats": loss.nats, "bpb": loss.bpb, "windows": len(table), "tokens": loss.tokens}
    elapsed = {"elapsed_s": round(time.monotonic() - started, 1)}
    write_json(METRICS_DIRECTORY / "evaluation" / f"{name}.json", metrics | elapsed)


def _benchmarks(candidate: Candidate, config: Config, out: Path) -> dict[str, Any]:
    """Figures by task, protocol and number of shots."""
    at = config.at.evaluation
    gathered = gather(configured_benchmarks(config), Path(at.data) if at.data else None, at.hub)
    refuse_overlong_shots(candidate, gathered)
    found: dict[str, Any] = {}
    for result, _ in evaluate(candidate, gathered, out, at.batch_tokens):
        who = result.identity
        figures = result.metrics or {"status": "data not available", "reason": result.unavailable}
        found.setdefault(who.task, {}).setdefault(who.protocol, {})[f"{who.shots}-shot"] = figures
    return found


def _validation(candidate: Candidate, config: Config) -> ValidationLoss:
    shards, seq_len = TokenShards(SHARDS_DIRECTORY, "val"), config.at.batch.seq_len
    tokenizer = load_tokenizer(SHARDS_DIRECTORY / "tokenizer")
    windows, rows = window_count(shards, seq_len), max(1, config.at.evaluation.batch_tokens // seq_len)
    with progress_bar(windows, 0, "window", f"{candidate.name}: validation") as bar:
        if candidate.vocabulary == tokenizer.fingerprint:
            lengths = tokenizer.byte_lengths
            return validation_loss(candidate.model, shards, lengths, seq_len, None, rows, bar.update, together=True)
        projection = Projection(candidate.tokenizer, tokenizer, candidate.model.context)
        return native_loss(candidate.model, projection, shards, seq_len, np.arange(windows), rows, bar.update)


if __name__ == "__main__":
    run_shared_stage(main)
