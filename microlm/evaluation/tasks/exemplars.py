"""The fixed exemplars before every question of a task; none of them is in the evaluated split."""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

from microlm.corpus.parts import EVALUATION, OLMES_REQUESTS, PARTS_DIRECTORY, part_file
from microlm.errors import UserError
from microlm.evaluation.tasks.data import Rows
from microlm.evaluation.tasks.formats import Row, canonical
from microlm.evaluation.tasks.prompts import check_protocol, questions, true_ending
from microlm.evaluation.tasks.task import Task
from microlm.files import read_yaml

SEPARATOR = "\n\n"
OLMES_EXEMPLARS = 5  # of each task
OLMES_EVERYWHERE = ("hellaswag",)  # tasks with OLMES's exemplars, in its rendering, under every protocol
EXEMPLARS = Path(__file__).with_name("exemplars.yaml")
_SHARED = {"mnli_mismatched": "mnli"}  # the same task in other genres


def check_shots(task: Task, protocol: str, shots: int) -> None:
    """UserError if `task` has fewer exemplars than `shots`; reads no data."""
    there = OLMES_EXEMPLARS if _is_olmes(task, protocol) else len(_own(task, protocol))
    if not 0 <= shots <= there:
        choose = f"choose 0 to {there}" if there else "choose 0"
        raise UserError(f"shots: {shots} asked for, but {task.name} has {there} exemplars under {protocol}; {choose}")


def _is_olmes(task: Task, protocol: str) -> bool:
    return protocol == "olmes" or task.name in OLMES_EVERYWHERE


def few_shot(task: Task, protocol: str, shots: int, parts: Path = PARTS_DIRECTORY) -> str:
    """The text of the first `shots` exemplars, each followed by a blank line; "" for none.

    Under olmes, and HellaSwag's under every protocol, they are OLMES's five in OLMES's rendering; the others are our
    own, put in the protocol's words.

    Raises:
        UserError: there are fewer exemplars than asked for, the task has no such protocol, or a file is absent or
            damaged.
    """
    check_protocol(task, protocol)
    if shots == 0:
        return ""
    check_shots(task, protocol, shots)
    exemplars = _olmes(task, parts) if _is_olmes(task, protocol) else _own(task, protocol)
    return "".join(exemplar + SEPARATOR for exemplar in exemplars[:shots])


def _olmes(task: Task, parts: Path) -> list[str]:
    """All that stands before the question in AI2's five-shot requests; it is the same in every one of them."""
    member = OLMES_REQUESTS[task.name]
    path = part_file(EVALUATION, member, parts)
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
    written = _written().get(_SHARED.get(task.name, task.name))
    if not written:
        return []
    rows = Rows(canonical(task, written, str(EXEMPLARS), {}), {"source": "exemplars"})
    return [question.context + true_ending(question) for question in questions(task, protocol, rows)]
