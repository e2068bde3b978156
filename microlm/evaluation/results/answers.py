"""From the loss of each ending to an answer, by every normaliser at once.

A normaliser is what the summed loss of an ending is divided by, or compared with, before the lowest is taken: so that a
figure can be matched to any publication, one pass gives the answer by each of them.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from microlm.evaluation.tasks.prompts import Question
from microlm.evaluation.tasks.task import task_named

# what acc_norm means under a protocol; acc is by the sum everywhere
NORMALISER = {"completion": "token", "lm-eval": "character", "olmes": "character"}
NORMALISER |= dict.fromkeys(("question", "infill", "microlm"), "sum")
NORMALISERS = ("sum", "token", "character", "byte", "pmi")
NEAR_TIE = 1e-4  # nats, per unit of the normaliser: closer than two backends in fp32 are sure to agree on


def answers(
    questions: Sequence[Question],
    nats: Sequence[np.ndarray],
    tokens: Sequence[np.ndarray],
    unconditional: Sequence[np.ndarray] | None,
    protocol: str = "completion",
    missed: Sequence[np.ndarray] | None = None,
) -> pd.DataFrame:
    """One row a question, in the order given; among equal endings the first is the answer.

    Columns: item, cluster, label; nats_k, tokens_k, characters_k, bytes_k and, if scored, unconditional_k of ending k,
    NaN beyond a question's own endings. Of a choice task also prediction_<n> and correct_<n> by each normaliser n (sum,
    token, character, byte, and pmi: nats minus unconditional nats); gold_nats and gold_bytes of the true ending;
    margin, nats per byte of the best wrong ending minus those of the true one; near_tie, where acc or acc_norm hangs on
    less than 1e-4 nats. Of a regression `value`: the mean of the numbers that the endings spell, weighted by
    softmax(-nats). Of a word prediction_sum, -1 unless greedy decoding writes it, correct_sum, gold_nats, gold_bytes.

    Args:
        questions: of one task.
        nats: summed loss of each question's endings, one array [endings] a question.
        tokens: how many tokens each ending has, likewise.
        unconditional: the endings' loss after `Question.unconditional` in place of the context, likewise.
        protocol: says by `NORMALISER` what acc_norm is.
        missed: of a word, the tokens of each ending that are not the likeliest, likewise.

    Raises:
        ValueError: the lists are not of one length, or a question is scored on other than its endings.
    """
    sizes = [len(question.endings) for question in questions]
    lengths = {"tokens": tokens, "characters": [q.characters for q in questions]}
    lengths["bytes"] = [[len(ending.encode()) for ending in q.endings] for q in questions]
    given = {"nats": nats, **lengths, "unconditional": unconditional}
    columns = {name: _padded(rows, sizes) for name, rows in given.items() if rows is not None}
    kind = task_named(questions[0].task).kind if questions else "choice"
    regression = kind == "regression"
    labels = np.array([question.label for question in questions], dtype=np.float64 if regression else np.int64)
    table = {"item": [q.id for q in questions], "cluster": [q.cluster for q in questions], "label": labels}
    for name, values in columns.items():
        table |= {f"{name}_{k}": values[:, k] for k in range(values.shape[1])}
    nats = columns["nats"]
    if regression:
        numbers = np.array([[float(ending) for ending in question.endings] for question in questions])
        weights = np.exp(nats.min(axis=1, keepdims=True) - nats)
        table["value"] = (weights * numbers).sum(axis=1) / weights.sum(axis=1)
    elif kind == "word":
        written = _padded(missed or (), sizes)[:, 0] == 0
        table |= {"prediction_sum": np.where(written, 0, -1), "correct_sum": written}
        table |= {"gold_nats": nats[:, 0], "gold_bytes": columns["bytes"][:, 0]}
    else:
        table |= _choices(columns, labels, NORMALISER[protocol])
    return pd.DataFrame(table)


def normalised(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Losses [questions, endings] by normaliser; the lowest of a row is the answer. NaN beyond a question's endings."""
    nats = columns["nats"]
    losses = {"sum": nats} | {
        name: nats / columns[f"{name}s"].clip(min=1) for name in NORMALISERS if f"{name}s" in columns
    }
    if "unconditional" in columns:
        losses["pmi"] = nats - columns["unconditional"]
    return losses


def _choices(columns: dict[str, np.ndarray], labels: np.ndarray, own: str) -> dict[str, np.ndarray]:
    rows = np.arange(len(labels))
    losses = {name: np.where(np.isnan(loss), np.inf, loss) for name, loss in normalised(columns).items()}
    table: dict[str, np.ndarray] = {}
    for name, loss in losses.items():
        table[f"prediction_{name}"] = loss.argmin(axis=1)
        table[f"correct_{name}"] = table[f"prediction_{name}"] == labels
    wrong = losses["byte"].copy()
    wrong[rows, labels] = np.inf
    table |= {"gold_nats": columns["nats"][rows, labels], "gold_bytes": columns["bytes"][rows, labels]}
    table["margin"] = wrong.min(axis=1) - losses["byte"][rows, labels]
    lead = np.minimum(*(np.diff(np.partition(losses[name], 1, axis=1)[:, :2])[:, 0] for name in ("sum", own)))
    return table | {"near_tie": lead < NEAR_TIE}


def _padded(rows: Sequence[Sequence[float] | np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Rows of `sizes` numbers -> [rows, longest], NaN beyond each row's own."""
    if len(rows) != len(sizes) or any(len(row) != size for row, size in zip(rows, sizes)):
        raise ValueError("each question must have one number for each of its endings")
    padded = np.full((len(sizes), max(sizes, default=0)), math.nan)
    for place, row in enumerate(rows):
        padded[place, : sizes[place]] = row
    return padded


def curve_figures(table: pd.DataFrame, protocol: str) -> dict[str, float]:
    """acc_norm, acc and gold_bpb (bits per byte of the true endings): what a training logs as it goes."""
    bits = float(table["gold_nats"].sum()) / math.log(2)
    return {
        "acc_norm": float(table[f"correct_{NORMALISER[protocol]}"].mean()),
        "acc": float(table["correct_sum"].mean()),
        "gold_bpb": bits / float(table["gold_bytes"].sum()),
    }
