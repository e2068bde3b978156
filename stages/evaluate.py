"""Score one model on HellaSwag and on validation text -> data/evaluation/<model>/, metrics/evaluation/<model>.json."""

import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from microlm.config import Config, load_config
from microlm.console import progress_bar
from microlm.corpus.batches import window_count
from microlm.corpus.parts import part_file
from microlm.corpus.shards import SHARDS_DIRECTORY, TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError, run_stage
from microlm.evaluation import METRICS_DIRECTORY, MODELS, SCORES_DIRECTORY, engine, tasks
from microlm.evaluation.protocols import COMPLETION
from microlm.evaluation.statistics import accuracy_errors
from microlm.evaluation.validation import validation_loss
from microlm.files import atomic_directory, write_json
from microlm.hub import load_language_model, load_teacher
from microlm.language_model import LanguageModel
from microlm.runtime import set_up


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        raise UserError(f"stages.evaluate: name one of {', '.join(MODELS)}, e.g. python -m stages.evaluate student")
    name, config, started = sys.argv[1], load_config(), time.monotonic()
    runtime = set_up(config.at.runtime)
    path, dtype = Path("models") / name, runtime.dtype
    model = load_teacher(config.at.teacher, dtype) if name == "teacher" else load_language_model(path, dtype)
    model.to(runtime.device)
    metrics = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    tokenizer = load_tokenizer(SHARDS_DIRECTORY / "tokenizer")
    with atomic_directory(SCORES_DIRECTORY / name) as folder:
        metrics["hellaswag"] = _hellaswag(name, model, tokenizer, config, folder / "items.parquet")
        metrics["validation"] = _validation(name, model, tokenizer, config, folder / "windows.parquet")
    elapsed = {"elapsed_s": round(time.monotonic() - started, 1)}
    write_json(METRICS_DIRECTORY / "evaluation" / f"{name}.json", metrics | elapsed)


def _hellaswag(name: str, model: LanguageModel, tokenizer: Tokenizer, config: Config, path: Path) -> dict[str, Any]:
    questions = tasks.hellaswag_items(part_file(tasks.PART, tasks.MEMBER))
    items = tasks.stratified_subset(questions, config.at.evaluation.items)
    packed = engine.pack_items(items, tokenizer, model.context)
    with progress_bar(len(packed), 0, "question", f"{name}: HellaSwag") as bar:
        answered = engine.score(model, packed, config.at.evaluation.batch_tokens, bar.update, name)
    answered.to_parquet(path, index=False)
    scores = engine.accuracy(answered) | accuracy_errors(answered)
    scores |= {"truncated": sum(item.truncated for item in packed)}
    return {"protocol": COMPLETION, "shots": 0, "items": len(packed), **scores}


def _validation(name: str, model: LanguageModel, tokenizer: Tokenizer, config: Config, path: Path) -> dict[str, float]:
    shards, seq_len = TokenShards(SHARDS_DIRECTORY, "val"), config.at.batch.seq_len
    windows, rows = window_count(shards, seq_len), max(1, config.at.evaluation.batch_tokens // seq_len)
    with progress_bar(windows, 0, "window", f"{name}: validation") as bar:
        loss = validation_loss(model, shards, tokenizer.byte_lengths, seq_len, windows, rows, bar.update)
    table = pd.DataFrame({"window": loss.windows, "nats": loss.window_nats, "bytes": loss.window_bytes})
    table.to_parquet(path, index=False)
    return {"nats": loss.nats, "bpb": loss.bpb, "windows": len(table), "tokens": loss.tokens}


if __name__ == "__main__":
    run_stage(main)
