"""How a question becomes token ids, and how its losses become an answer.

The completion protocol is build-nanogpt's (`hellaswag.py`, commit 6104ab1b): the raw `ctx`, each ending after one
space, no shots, no begin-of-text token; context and endings are encoded apart. `acc_norm` takes the ending of lowest
mean loss per token, `acc` the one of lowest summed loss. lm-eval's figure of the same name normalises by characters of
cleaned text: the two are not comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from microlm.evaluation.tasks import ENDINGS, HellaSwagItem

COMPLETION = "completion"
# GPT-2 124M under this very protocol, from the docstring of build-nanogpt's hellaswag.py ("completion style")
GPT2_124M_ACC_NORM = 0.2955


class BatchEncoder(Protocol):
    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]: ...


@dataclass(frozen=True)
class EncodedItem:
    """A question in token ids (int64 arrays, no special tokens) with the bytes of text behind each ending."""

    index: int
    source_id: str
    label: int
    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    ending_bytes: tuple[int, ...]


def encode_completion(items: Sequence[HellaSwagItem], tokenizer: BatchEncoder) -> list[EncodedItem]:
    """Each question in the completion protocol's form."""
    contexts = tokenizer.encode_batch([item.context for item in items])
    texts = [" " + ending for item in items for ending in item.endings]
    endings = [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]
    encoded = []
    for row, item in enumerate(items):
        mine = slice(row * ENDINGS, (row + 1) * ENDINGS)
        lengths = tuple(len(text.encode()) for text in texts[mine])
        context = np.asarray(contexts[row], dtype=np.int64)
        encoded.append(EncodedItem(item.index, item.source_id, item.label, context, tuple(endings[mine]), lengths))
    return encoded


def answers(items: Sequence[EncodedItem], nats: np.ndarray) -> pd.DataFrame:
    """One row per question from the summed losses `nats` [items, 4] of its endings; among equals the first wins.

    Columns: item, source_id, label; nats_k, tokens_k, bytes_k of ending k; prediction_norm and prediction (lowest mean
    per token and lowest sum), correct_norm, correct; gold_nats and gold_bytes of the true ending.
    """
    tokens = np.array([[len(ending) for ending in item.endings] for item in items])
    sizes = np.array([item.ending_bytes for item in items])
    labels = np.array([item.label for item in items])
    rows = np.arange(len(items))
    norm, plain = (nats / tokens).argmin(axis=1), nats.argmin(axis=1)
    columns = {"item": [item.index for item in items], "source_id": [item.source_id for item in items], "label": labels}
    for name, values in (("nats", nats), ("tokens", tokens), ("bytes", sizes)):
        columns |= {f"{name}_{k}": values[:, k] for k in range(ENDINGS)}
    columns |= {"prediction_norm": norm, "prediction": plain}
    columns |= {"correct_norm": norm == labels, "correct": plain == labels}
    columns |= {"gold_nats": nats[rows, labels], "gold_bytes": sizes[rows, labels]}
    return pd.DataFrame(columns)
