"""Score one model on the benchmarks, on validation text and on text of another kind, and let it write.

data/evaluation/<model>/ gets a row for each question and window, and samples.json: what the model writes to the fixed
prompts. metrics/evaluation/<model>.json gets the figures.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from microlm.config import Config, load_config
from microlm.corpus.batches import evenly_spaced, window_count
from microlm.corpus.tokenizer import load_tokenizer
from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.candidates import Candidate, load_pipeline_model
from microlm.evaluation.results.store import model_slug
from microlm.evaluation.run import evaluate, refuse_before_scoring
from microlm.evaluation.samples import SAMPLES, samples
from microlm.evaluation.scoring.held_out_loss import ValidationLoss, held_out, loss_on
from microlm.evaluation.tasks.benchmarks import configured_benchmarks, gather
from microlm.files import atomic_directory, write_json, write_sums
from microlm.runtime import distributed
from microlm.runtime.device import set_up
from microlm.runtime.launcher import run_shared_stage
from microlm.runtime.paths import METRICS, SCORES, SHARDS
from microlm.runtime.resume import resumable
from microlm.runtime.terminal import progress_bar, waiting
from microlm.teacher.projection import Projection, native_loss


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in SCORED_MODELS:
        raise UserError(
            f"stages.evaluate: name one of {', '.join(SCORED_MODELS)}, e.g. python -m stages.evaluate student"
        )
    name, config, started = sys.argv[1], load_config(), time.monotonic()
    runtime = set_up(config.at.runtime)
    with waiting(f"{name}: reading it"):
        candidate = load_pipeline_model(name, config.at.teacher, runtime.dtype)
    candidate.model.to(runtime.device)
    metrics: dict[str, Any] = {"model": name, "parameters": candidate.parameters, "weights_sha256": candidate.weights}
    # a benchmark that an interrupted run finished is taken from here: each says which weights and questions it is of
    with resumable(f"evaluate@{name}", candidate.weights) as done:
        metrics["tasks"], losses = _benchmarks(candidate, config, done), _losses(candidate, config)
        if not distributed.is_first():
            return
        with atomic_directory(SCORES / name) as folder:
            for file in (done / model_slug(name)).iterdir():
                shutil.copy(file, folder)
            windows = (
                pd.DataFrame({"split": split, "window": of.windows, "nats": of.window_nats, "bytes": of.window_bytes})
                for split, of in losses.items()
            )
            pd.concat(windows).to_parquet(folder / "windows.parquet", index=False)
            write_json(folder / SAMPLES, samples(candidate))
            write_sums(folder)
    for split, loss in losses.items():
        text = {"val": "validation"}.get(split, split)
        metrics[text] = {"nats": loss.nats, "bpb": loss.bpb, "windows": len(loss.windows), "tokens": loss.tokens}
    metrics["elapsed_s"] = round(time.monotonic() - started, 1)
    write_json(METRICS / "evaluation" / f"{name}.json", metrics)


def _benchmarks(candidate: Candidate, config: Config, out: Path) -> dict[str, Any]:
    """Figures by task, protocol and number of shots."""
    at = config.at.evaluation
    with config.naming_keys():
        asked = configured_benchmarks(at.benchmarks)
    with waiting("reading the benchmarks"):
        gathered = gather(asked, Path(at.data) if at.data else None, at.hub, config.at.corpus.source)
    refuse_before_scoring(candidate, gathered, out)
    found: dict[str, Any] = {}
    for result, _ in evaluate(candidate, gathered, out, at.batch_tokens):
        who = result.identity
        figures = result.metrics or {"status": result.status, "reason": result.unavailable}
        found.setdefault(who.task, {}).setdefault(who.protocol, {})[f"{who.shots}-shot"] = figures
    return found


def _losses(candidate: Candidate, config: Config) -> dict[str, ValidationLoss]:
    """On evenly spaced windows of each text that is held out, the same ones for every model."""
    at, tokenizer = config.at, load_tokenizer(SHARDS / "tokenizer")
    seq_len, rows = at.batch.seq_len, max(1, at.evaluation.batch_tokens // at.batch.seq_len)
    native = candidate.tokenizer.fingerprint != tokenizer.fingerprint
    projection = Projection(candidate.tokenizer, tokenizer, candidate.model.context) if native else None
    found, model, lengths = {}, candidate.model, tokenizer.byte_lengths
    for split, shards in held_out(at).items():
        available = window_count(shards, seq_len)
        chosen = evenly_spaced(available, at.evaluation.windows or available)
        with progress_bar(len(chosen), 0, "window", f"{candidate.name}: {split} text") as bar:
            if projection:
                found[split] = native_loss(model, projection, shards, seq_len, chosen, rows, bar.update)
            else:
                found[split] = loss_on(model, shards, lengths, seq_len, chosen, rows, bar.update, together=True)
    return found


if __name__ == "__main__":
    run_shared_stage(main)
