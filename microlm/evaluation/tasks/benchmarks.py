"""A benchmark: a task under a protocol with a number of shots. What is wrong with it, its exemplars, its questions."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from microlm.corpus.parts import EVALUATION, OLMES_REQUESTS, PARTS_DIRECTORY, part_file
from microlm.errors import ParameterError, UserError
from microlm.evaluation.tasks.data import DataNotAvailable, Row, Rows, canonical, read_rows
from microlm.evaluation.tasks.prompts import Question, check_protocol, questions, stratified_subset, true_ending
from microlm.evaluation.tasks.task import IN_CORPUS, Benchmark, Task, task_named
from microlm.files import read_yaml, sha256_json
from microlm.parameters import BenchmarkConfig

SEPARATOR = "\n\n"
OLMES_EXEMPLARS = 5  # of each task
OLMES_EVERYWHERE = ("hellaswag",)  # tasks with OLMES's exemplars, in its rendering, under every protocol
EXEMPLARS = Path(__file__).with_name("exemplars.yaml")  # none of them is in the evaluated split
_SHARED = {"mnli_mismatched": "mnli"}  # the same task in other genres


def benchmarks(tasks: Sequence[str], protocol: str | None, shots: Sequence[int], limit: int | None) -> list[Benchmark]:
    """Each task with each number of shots. UserError for an unknown task, a protocol it has not, or too many shots."""
    found = []
    for task, number in product(map(task_named, tasks), shots):
        found.append(Benchmark(task.name, protocol or task.protocols[0], number, limit))
        _check_shots(task, found[-1].protocol, number)
    return found


def configured_benchmarks(blocks: Sequence[BenchmarkConfig]) -> list[Benchmark]:
    """Those of `evaluation.benchmarks`. ParameterError naming the one that is wrong."""
    found = []
    for number, block in enumerate(blocks):
        try:
            found += benchmarks(block.tasks, block.protocol, [block.shots], block.items)
        except UserError as error:
            raise ParameterError(f"evaluation.benchmarks[{number}]: {error}") from None
    return found


def _check_shots(task: Task, protocol: str, shots: int) -> None:
    """UserError if `task` has no such protocol, or fewer exemplars than `shots`; reads no data."""
    check_protocol(task, protocol)
    there = OLMES_EXEMPLARS if _is_olmes(task, protocol) else len(_own(task, protocol))
    if not 0 <= shots <= there:
        choose = f"choose 0 to {there}" if there else "choose 0"
        raise UserError(f"shots: {shots} asked for, but {task.name} has {there} exemplars under {protocol}; {choose}")


def few_shot(task: Task, protocol: str, shots: int, parts: Path = PARTS_DIRECTORY) -> str:
    """The text of the first `shots` exemplars, each followed by a blank line; "" for none.

    Under olmes, and HellaSwag's under every protocol, they are OLMES's five in OLMES's rendering; the others are our
    own, put in the protocol's words.

    Raises:
        UserError: there are fewer exemplars than asked for, the task has no such protocol, or a file is absent or
            damaged.
    """
    _check_shots(task, protocol, shots)
    if shots == 0:
        return ""
    exemplars = _olmes(task, parts) if _is_olmes(task, protocol) else _own(task, protocol)
    return "".join(exemplar + SEPARATOR for exemplar in exemplars[:shots])


def _is_olmes(task: Task, protocol: str) -> bool:
    return protocol == "olmes" or task.name in OLMES_EVERYWHERE


def _olmes(task: Task, parts: Path) -> list[str]:
    """All that stands before the question in AI2's five-shot requests; it is the same in every one of them."""
    with gzip.open(part_file(EVALUATION, OLMES_REQUESTS[task.name], parts), "rt", encoding="utf-8") as file:
        return json.loads(file.readline())["request"]["context"].split(SEPARATOR)[:-1]


@cache
def _written() -> dict[str, list[Row]]:
    return read_yaml(EXEMPLARS, "install microlm again", "rte: [...]")


def _own(task: Task, protocol: str) -> list[str]:
    written = _written().get(_SHARED.get(task.name, task.name))
    if not written:
        return []
    rows = Rows(canonical(task, written, str(EXEMPLARS), {}), {})
    return [question.context + true_ending(question) for question in questions(task, protocol, rows)]


@dataclass(frozen=True)
class Material:
    """A benchmark's questions as text, or why there are none.

    `data` says where these were read: the provenance of `Rows`, but for its sha256.
    """

    benchmark: Benchmark
    questions: tuple[Question, ...] = ()
    prefix: str = ""
    data_sha256: str | None = None
    unavailable: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Question, ...]:
        """The questions as they are read: one whose endings have contexts of their own once for each."""
        return tuple(read for question in self.questions for read in question.read())

    @property
    def digest(self) -> str | None:
        """sha256 of all that is shown to a model."""
        if self.unavailable:
            return None
        shown = [[q.id, q.label, q.context, *q.openings, *q.endings] for q in self.questions]
        return sha256_json([self.prefix, shown])


def gather(wanted: Sequence[Benchmark], folder: Path | None, hub: bool, corpus: str = "") -> list[Material]:
    """The questions of every benchmark; a limit that leaves none out is none. UserError for data that is damaged.

    Tasks whose own texts are in the source `corpus`, on which the model is trained, are left out.
    """
    return [_gather(benchmark, folder, hub, corpus) for benchmark in wanted]


def _gather(benchmark: Benchmark, folder: Path | None, hub: bool, corpus: str) -> Material:
    task, protocol = task_named(benchmark.task), benchmark.protocol
    try:
        if corpus and task.in_corpus == corpus:
            raise DataNotAvailable(IN_CORPUS)
        rows = read_rows(task, folder, hub)
    except DataNotAvailable as missing:
        return Material(_within(benchmark, task.published), unavailable=str(missing))
    asked = questions(task, protocol, rows)
    benchmark = _within(benchmark, len(asked))
    if benchmark.limit is not None:
        asked = stratified_subset(asked, benchmark.limit)
    data = dict(rows.provenance)
    sha256 = data.pop("sha256")  # the result's identity has that
    return Material(benchmark, tuple(asked), few_shot(task, protocol, benchmark.shots), sha256, data=data)


def _within(benchmark: Benchmark, size: int) -> Benchmark:
    """A limit that is not below the number of questions asks for the whole split."""
    whole = benchmark.limit is not None and benchmark.limit >= size
    return benchmark._replace(limit=None) if whole else benchmark
