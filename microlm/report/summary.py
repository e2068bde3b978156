"""metrics/summary.json: every model's scores, and the paired differences that answer the question."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from microlm.errors import UserError
from microlm.evaluation import ARMS, MODELS
from microlm.evaluation.results.statistics import Interval, mcnemar_exact, paired_bootstrap, paired_ratio_bootstrap
from microlm.files import check_sums, read_json
from microlm.report.benchmark_table import entries
from microlm.runtime.paths import METRICS, SCORES

# the stage that makes each model's metrics/<name>.json, and each arm's curves
MADE_BY = {"control": "pretrain", "continued": "continue", "student": "distill", "teacher": "teacher"}
COMPARISONS = (("student", "continued"), ("student", "control"))
# bits per byte of held-out text: of the corpus's kind, and of another; in the metrics, and in windows.parquet
YARDSTICKS = {"val_bpb": ("validation", "val"), "ood_bpb": ("outside", "outside")}
HEADLINE = ("hellaswag", "completion", "0-shot")
WINDOWS_PER_BLOCK = 4  # a document runs across the borders of windows, so neighbours are resampled together
FEWEST_BLOCKS = 20  # shorter validation splits have smaller blocks rather than fewer


@dataclass(frozen=True)
class Scores:
    """What stage `evaluate` wrote about one model.

    Its metrics, a row for each question of zero-shot HellaSwag, and a row for each window of held-out text.
    """

    metrics: Mapping[str, Any]
    items: pd.DataFrame
    windows: pd.DataFrame

    def windows_of(self, split: str) -> pd.DataFrame:
        return self.windows[self.windows["split"] == split].reset_index(drop=True)


def read_scores(data: Path = SCORES, metrics: Path = METRICS) -> dict[str, Scores]:
    """The scores of each model. UserError if one is absent, damaged, or about other questions or windows."""
    scores = {}
    for name in MODELS:
        stage = f"evaluate@{name}"
        if (data / name).is_dir():
            check_sums(data / name, os.listdir(data / name), f"make it again with: dvc repro -f -s {stage}")
        items = _read_table(_headline(data / name, stage), stage)
        windows = _read_table(data / name / "windows.parquet", stage)
        scores[name] = Scores(read_json(metrics / "evaluation" / f"{name}.json", stage), items, windows)
    for name in MODELS[1:]:
        _require_same(scores, MODELS[0], name, "items", ["item", "label", "bytes_0", "bytes_1", "bytes_2", "bytes_3"])
        _require_same(scores, MODELS[0], name, "windows", ["split", "window", "bytes"])
    return scores


def _headline(folder: Path, stage: str) -> Path:
    """The table of the benchmark that the report speaks of: zero-shot HellaSwag by the completion protocol."""
    found = sorted(folder.glob(f"{HEADLINE[0]}.{HEADLINE[1]}.{HEADLINE[2].replace('-', '')}*.parquet"))
    if len(found) != 1:
        raise UserError(
            f"{folder}: {len(found)} results of zero-shot {HEADLINE[0]} ({HEADLINE[1]}); name it once under "
            f"evaluation.benchmarks in params.yaml, then: dvc repro -f -s {stage}"
        )
    return found[0]


def _read_table(path: Path, stage: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; make it with: dvc repro {stage}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); make it again with: dvc repro -f -s {stage}") from None


def _require_same(scores: Mapping[str, Scores], first: str, other: str, table: str, keys: list[str]) -> None:
    a, b = (getattr(scores[name], table) for name in (first, other))
    if not set(keys) <= set(a) & set(b) or not a[keys].equals(b[keys]):
        folders = " and ".join(str(SCORES / name) for name in (other, first))
        raise UserError(
            f"{folders} are not about the same {table} and cannot be compared; "
            f"score both again with: dvc repro -f -s evaluate@{first} evaluate@{other}"
        )


def summarize(
    scores: Mapping[str, Scores],
    training: Mapping[str, Mapping[str, Any]],
    distillation: Mapping[str, Any],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """metrics/summary.json as a dict.

    Args:
        training: metrics/<arm>.json of each arm and metrics/teacher.json as `teacher`.
        distillation: what the student was trained with, e.g. alpha, objective, temperature; shown as it is.
    """
    summary: dict[str, Any] = dict(distillation)
    summary |= {"questions": len(scores["student"].items), "windows": len(scores["student"].windows_of("val"))}
    if "outside" in scores["student"].metrics:
        summary["outside_windows"] = len(scores["student"].windows_of("outside"))
    for name, score in scores.items():
        summary[name] = _model_row(score.metrics)
    for arm in ARMS:
        summary[arm] |= {key: training[arm][key] for key in ("tokens_before", "tokens")}
    summary["teacher"] |= _teacher_cost(summary, training["teacher"])
    for a, b in COMPARISONS:
        summary[f"{a}_minus_{b}"] = _difference(scores[a], scores[b], draws, seed)
    difference = summary["student_minus_continued"]
    summary["verdict"] = {key: _verdict(difference, key) for key in YARDSTICKS if key in difference}
    return summary


def _model_row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    task, protocol, shots = HEADLINE
    hellaswag = metrics["tasks"][task][protocol][shots]
    scored = {key: round(hellaswag[key], 6) for key in ("acc_norm", "acc_norm_se", "acc", "acc_se", "gold_bpb")}
    bits = {key: round(metrics[text]["bpb"], 6) for key, (text, _) in YARDSTICKS.items() if text in metrics}
    return {"parameters": metrics["parameters"], **bits, **scored}


def _teacher_cost(summary: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Labelling against distilling, at 2 FLOPs a parameter and token forward, 4 more backward (Kaplan et al. 2020).

    A live teacher labels every token of the student's steps, one with a cache each window once.
    """
    student = summary["student"]
    labelled = student["tokens"] if teacher["source"] == "live" else teacher["tokens"]
    cost = 2 * summary["teacher"]["parameters"] * labelled / (6 * student["parameters"] * student["tokens"])
    return {
        "source": teacher["source"],
        "tokens_labelled": labelled,
        "labelling_to_distilling_flops": round(cost, 6),
    }


def _difference(a: Scores, b: Scores, draws: int, seed: int) -> dict[str, float]:
    """a minus b on bits per byte of held-out text and of true endings, and on acc_norm, each with its interval."""
    found: dict[str, float] = {}
    for key, (text, split) in YARDSTICKS.items():
        if text in a.metrics:
            found |= entries(key, _bits_per_byte(a.windows_of(split), b.windows_of(split), draws, seed))
    gold = [(score.items["gold_nats"] / np.log(2), score.items["gold_bytes"]) for score in (a, b)]
    right = [score.items["correct_token"] for score in (a, b)]
    source = a.items["cluster"]
    found |= entries("gold_bpb", paired_ratio_bootstrap(*gold, source, draws, seed))
    found |= entries("acc_norm", paired_bootstrap(*right, source, draws, seed))
    return found | {"acc_norm_mcnemar_p": round(mcnemar_exact(*right), 6)}


def _bits_per_byte(a: pd.DataFrame, b: pd.DataFrame, draws: int, seed: int) -> Interval:
    windows = len(a)
    if windows < 2:
        raise UserError(
            "data/shards: one validation window gives no interval; raise corpus.validation_fraction in params.yaml"
        )
    block = np.arange(windows) // min(WINDOWS_PER_BLOCK, max(1, windows // FEWEST_BLOCKS))
    bits = [(table["nats"] / np.log(2), table["bytes"]) for table in (a, b)]
    return paired_ratio_bootstrap(*bits, block, draws, seed)


def _verdict(difference: Mapping[str, float], yardstick: str) -> str:
    if difference[f"{yardstick}_high"] < 0:
        return "distillation better than continuation"
    if difference[f"{yardstick}_low"] > 0:
        return "continuation better than distillation"
    return "no difference shown"
