"""A benchmark: a task under a protocol with a number of shots. Which of them are asked for, refused before any work."""

from collections.abc import Sequence
from dataclasses import dataclass

from microlm.config import Config
from microlm.errors import UserError
from microlm.evaluation.few_shot import check_shots
from microlm.evaluation.prompts import check_protocol
from microlm.evaluation.tasks import Task, task_named


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


def configured_benchmarks(config: Config) -> list[Benchmark]:
    """Those of params.yaml. UserError naming the key."""
    found = []
    for number, block in enumerate(config.at.evaluation.benchmarks):
        try:
            found += benchmarks(block.tasks, block.protocol, [block.shots], block.items)
        except UserError as error:
            raise UserError(f"params.yaml: scales.{config.scale}.evaluation.benchmarks[{number}]: {error}") from None
    return found
