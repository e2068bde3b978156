"""The fixed exemplars before every question of a task; none of them is in the evaluated split."""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

from microlm.corpus.parts import EVALUATION, HELLASWAG_REQUESTS, PARTS_DIRECTORY, part_file
from microlm.errors import UserError
from microlm.evaluation.formats import Row, canonical
from microlm.evaluation.prompts import check_protocol, questions, true_ending
from microlm.evaluation.sources import Rows, checked_part
from microlm.evaluation.tasks import Task
from microlm.files import read_yaml

SEPARATOR = "\n\n"
HELLASWAG_EXEMPLARS = 5  # that OLMES chose
EXEMPLARS = Path(__file__).with_name("exemplars.yaml")
_SHARED = {"mnli_mismatched": "mnli"}  # the same task in other genres


def check_shots(task: Task, protocol: str, shots: int) -> None:
    """UserError if `task` has fewer exemplars than `shots`; reads no data."""
    there = HELLASWAG_EXEMPLARS if task.name == "hellaswag" else len(_own(task, protocol))
    if not 0 <= shots <= there:
        raise UserError(f"shots: {shots} asked for, but {task.name} has {there} exemplars; choose 0 to {there}")


def few_shot(task: Task, protocol: str, shots: int, parts: Path = PARTS_DIRECTORY) -> str:
    """The text of the first `shots` exemplars, each followed by a blank line; "" for none.

    HellaSwag's are OLMES's five, in OLMES's rendering under every protocol; the other tasks' are our own, put in the
    protocol's words.

    Raises:
        UserError: there are fewer exemplars than asked for, the task has no such protocol, or a file is absent or
            damaged.
    """
    check_protocol(task, protocol)
    if shots == 0:
        return ""
    check_shots(task, protocol, shots)
    exemplars = _hellaswag(parts) if task.name == "hellaswag" else _own(task, protocol)
    return "".join(exemplar + SEPARATOR for exemplar in exemplars[:shots])


def _hellaswag(parts: Path) -> list[str]:
    """All that stands before the question in AI2's five-shot requests; it is the same in every one of them."""
    path = part_file(EVALUATION, HELLASWAG_REQUESTS, parts)
    checked_part(parts, HELLASWAG_REQUESTS)
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            context = json.loads(file.readline())["request"]["context"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged ({reason}); make it again with: dvc repro -f -s fetch") from None
    return context.split(SEPARATOR)[:-1]


@cache
def _written() -> dict[str, list[Row]]:
    return read_yaml(EXEMPLARS, "install microlm again", "rte: [...]")


def _own(task: Task, protocol: str) -> list[str]:
    written = _written()[_SHARED.get(task.name, task.name)]
    rows = Rows(canonical(task, written, str(EXEMPLARS), {}), {"source": "exemplars"})
    return [question.context + true_ending(question) for question in questions(task, protocol, rows)]
