"""The committed laptop run, as stage `compare` finds it: what Git holds of it, and made-up samples.

Scores of single questions and the shards are not in Git; the page takes hashes alone from them.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from microlm.config import load_config
from microlm.evaluation import SCORED_MODELS
from microlm.evaluation.results.store import Identity, Result, write_result
from microlm.files import read_json, write_json
from microlm.report.page.write import write_page
from microlm.runtime.paths import SCORES, SHARDS, TRAINED_MODELS
from stages.compare import parameters_of
from tests.support.clones import ROOT
from tests.support.workspace import inside

COMMITTED = ("metrics", "plots", "params.yaml", ".dvc/plots")
PROMPTS = (
    "The city of Rome",
    "Photosynthesis is the process by which",
    "def double(x):\n    return",
    "A & B <i>said</i>:",
    "Once upon a time,",
    "\u0645\u062f\u064a\u0646\u0629",
    "2 + 2 =",
    "It",
)


def lay_out(top: Path) -> None:
    """Copy into `top` what Git holds, with results that say whose weights they are of."""
    for name in COMMITTED:
        source, target = ROOT / name, top / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    for name in SCORED_MODELS:
        identity = Identity(name, f"weights of {name}", "words", "snli", "question", 0, None, None, None)
        (top / SCORES / name).mkdir(parents=True)
        write_result(top / SCORES, Result(identity, unavailable="no network"))
    manifest = {"tokenizer": {"fingerprint": "of words"}, "splits": {"train": {"digest": "of the text"}}}
    write_json(top / SHARDS / "manifest.json", manifest)


def write_samples(top: Path, texts: Mapping[str, Sequence[str]], prompts: Sequence[str] = PROMPTS) -> None:
    """samples.json of each model in `texts`, a continuation for each prompt."""
    for name, said in texts.items():
        rows = [
            {"prompt": prompt, "continuation": text, "tokens": len(text.split()), "ended": bool(place % 2)}
            for place, (prompt, text) in enumerate(zip(prompts, said, strict=True))
        ]
        content = {"max_new_tokens": 40, "decoding": "greedy", "samples": rows}
        (top / SCORES / name / "samples.json").write_text(json.dumps(content))


def write_report(top: Path, **parameters: Any) -> Path:
    """plots/report.html out of what lies in `top`, with `parameters` beside or in place of the run's."""
    config = load_config(top / "params.yaml")
    with inside(top):
        summary = read_json("metrics/summary.json", "compare")
        items = dict.fromkeys(TRAINED_MODELS, config.at.continuation.hellaswag_items)
        return top / write_page(summary, parameters_of(config) | parameters, items, config.at.batch.batch_tokens)
