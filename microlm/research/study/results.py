"""study/results.csv: one row for each run of a group, the only record of a study.

A row stands for its run as long as the settings it resolved to and the code it ran under are those of today.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.files import atomic_file

LABELS = ("run", "group", "label", "scale", "init", "objective", "windows", "overrides", "settings", "code")
SCORES = ("val_bpb", "nats", "acc_norm", "gold_bpb")
PAIRS = ("student_minus_continued", "student_minus_control")
ENDS = ("", "_low", "_high")
# column -> where a run's metrics hold it
MEASURED = {
    "parameters": ("summary", "student", "parameters"),
    "tokens": ("summary", "student", "tokens"),
    **{f"{model}_{score}": ("summary", model, score) for model in SCORED_MODELS for score in SCORES},
    # in the place that the line above gives it
    **{f"{model}_nats": (f"evaluation/{model}", "validation", "nats") for model in SCORED_MODELS},
    **{
        f"{pair}_{score}{end}": ("summary", pair, score + end)
        for pair in PAIRS
        for score in ("val_bpb", "acc_norm")
        for end in ENDS
    },
    "teacher_tokens": ("summary", "teacher", "tokens_labelled"),
    "labelling_to_distilling_flops": ("summary", "teacher", "labelling_to_distilling_flops"),
    **{f"{model}_elapsed_s": (model, "elapsed_s") for model in ("student", "continued", "teacher")},
}
OUTSIDE = {
    **{f"{model}_ood_bpb": ("summary", model, "ood_bpb") for model in SCORED_MODELS},
    **{f"{pair}_ood_bpb{end}": ("summary", pair, f"ood_bpb{end}") for pair in PAIRS for end in ENDS},
}
"""Last in a file, and only where some run was scored on text of another kind; blank cells of a row without are NaN."""
NUMBERS = ("alpha", "seed", *MEASURED)
RECORDED = (*LABELS, *NUMBERS)
"""What every file has."""
COLUMNS = (*RECORDED, *OUTSIDE)

Row = dict[str, Any]


def read_results(path: Path) -> list[Row]:
    """The rows, numbers as numbers; none if there is no file yet. UserError naming the line if one is damaged."""
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _damaged(path, f"not text: {error}") from None
    if not lines or tuple(lines[0]) not in (RECORDED, COLUMNS):
        raise _damaged(path, "line 1: other columns than this version writes")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(lines[0]):
            raise _damaged(path, f"line {number}: {len(cells)} cells in place of {len(lines[0])}")
        row = dict.fromkeys(OUTSIDE, "") | dict(zip(lines[0], cells))
        for column in (*NUMBERS, *OUTSIDE):
            try:
                # as it was written, so that a row is written again as it was read
                number_of = int if row[column].lstrip("-").isdigit() else float
                row[column] = math.nan if column in OUTSIDE and not row[column] else number_of(row[column])
            except ValueError:
                raise _damaged(path, f"line {number}: {column}: {row[column]!r} is no number") from None
        rows.append(row)
    return rows


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}); take it from Git again: git checkout {path}, or remove it: make study then "
        "collects again what DVC still has"
    )


def add_rows(path: Path, fresh: Sequence[Row]) -> None:
    """Write the file again with `fresh` in it; an older row of the same run goes."""
    by_run = {row["run"]: row for row in (*read_results(path), *fresh)}
    # a NaN is a blank cell
    rows = [{column: cell for column, cell in by_run[run].items() if cell == cell} for run in sorted(by_run)]
    columns = COLUMNS if any(column in row for row in rows for column in OUTSIDE) else RECORDED
    with atomic_file(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
