"""A benchmark: a task under a protocol with a number of shots. Which of them are asked for, refused before any work."""

from collections.abc import Sequence
from dataclasses import dataclass

from microlm.errors import ParameterError, UserError
from microlm.evaluation.tasks.exemplars import check_shots
from microlm.evaluation.tasks.prompts import check_protocol
from microlm.evaluation.tasks.task import Task, task_named
from microlm.parameters import BenchmarkConfig


@dataclass(frozen=True)
class Benchmark:
    """`limit` questions of a fixed stratified subset, None for the whole split."""

    task: Task
    protocol: str
    shots: int
    limit: int | None

    def __str__(self) -> str:
        return f"{self.task.name} ({self.protocol}, {self.shots}-shot)"


def benchmarks(tasks: Sequence[str], protocol: str | None, shots: Sequence[int], limit: int | None) -> list[Benchmark]:
    """Each task with each number of shots. UserError for an unknown task, a protocol it has not, or too many shots."""
    found = []
    for name in tasks:
        task = task_named(name)
        chosen = protocol or task.protocols[0]
        check_protocol(task, chosen)
        for number in shots:
            check_shots(task, chosen, number)
            found.append(Benchmark(task, chosen, number, limit))
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
