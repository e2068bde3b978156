"""HellaSwag under the `lm-eval` protocol: ours against lm-evaluation-harness, same weights, cores, items and float32.

Each side scores in a process of its own, one after the other, so that its peak memory is its own; seconds are those of
scoring (encoding included, loading the model not). The harness comes with `pip install -e '.[bench]'`; it reads the
packaged questions from disk and, five-shot, the same five fixed exemplars in the same order.

    python -m bench.lm_eval [--shots 0] [--items 2000] [--batch 32] [--model FOLDER]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from microlm.corpus.parts import EVALUATION, part_file, validation_arrow
from microlm.evaluation.candidates import load_candidate
from microlm.evaluation.scoring.encoding import encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.benchmarks import few_shot
from microlm.evaluation.tasks.data import read_rows
from microlm.evaluation.tasks.prompts import questions
from microlm.evaluation.tasks.task import task_named
from microlm.models.teacher_source import PackagedTeacher

BATCH_TOKENS = 8192
NEAR = 1e-4  # nats per character between the best two endings: rounding may turn their order


def export_teacher(directory: Path) -> None:
    """The packaged teacher as a Hugging Face directory, which both sides read."""
    packaged = PackagedTeacher()
    packaged.load(torch.float32).network.save_pretrained(directory)
    packaged.tokenizer().save(directory)


def ours(model: str, items: list[int], shots: int, _: int) -> dict[str, Any]:
    candidate = load_candidate(model, None, torch.float32)
    began = time.perf_counter()
    task = task_named("hellaswag")
    asked = questions(task, "lm-eval", read_rows(task, None, hub=False))
    chosen = [asked[i] for i in items]
    exemplars = few_shot(task, "lm-eval", shots)
    encoding = encode(
        chosen, candidate.tokenizer, candidate.model.context, candidate.start_token, exemplars, begin=candidate.begin
    )
    nats = score(candidate.model, encoding.questions, BATCH_TOKENS, encoding.prefix)
    seconds = time.perf_counter() - began
    per_character = [-x / np.asarray(q.characters) for x, q in zip(nats, chosen)]
    return {
        "seconds": seconds,
        "sum": [(-x).tolist() for x in nats],
        "acc": [int(np.argmin(x)) for x in nats],
        "acc_norm": [int(x.argmax()) for x in per_character],
        "gap": [float(np.diff(np.sort(x)[-2:])[0]) for x in per_character],
    }


def theirs(model: str, items: list[int], shots: int, batch: int) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag.utils import process_docs

    blocks = few_shot(task_named("hellaswag"), "lm-eval", shots).split("\n\n")[:shots]
    exemplars = [{"query": text.split(" ", 1)[0], "choices": [text.split(" ", 1)[1]], "label": 0} for text in blocks]
    task = ConfigurableTask(
        config={
            "task": "hellaswag_packaged",
            "dataset_path": "arrow",
            "dataset_kwargs": {
                "data_files": {"validation": str(part_file(EVALUATION, validation_arrow("hellaswag/none")))}
            },
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{label}}",
            "doc_to_choice": "choices",
            "fewshot_config": {"sampler": "first_n", "samples": exemplars},
            "num_fewshot": shots,
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
            ],
        }
    )
    network = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch)
    began = time.perf_counter()
    found = simple_evaluate(network, tasks=[task], samples={"hellaswag_packaged": items}, bootstrap_iters=0)
    seconds = time.perf_counter() - began
    samples = sorted(found["samples"]["hellaswag_packaged"], key=lambda sample: items.index(sample["doc_id"]))
    sums = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    lengths = np.array([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])
    return {
        "seconds": seconds,
        "sum": sums.tolist(),
        "acc": sums.argmax(1).tolist(),
        "acc_norm": (sums / lengths).argmax(1).tolist(),
    }


def in_own_process(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / f"{side}.json"
    command = [sys.executable, "-m", "bench.lm_eval", "--side", side, "--out", str(out), "--model", arguments.model]
    options = ("--shots", arguments.shots, "--items", arguments.items, "--batch", arguments.batch)
    subprocess.run([*command, *map(str, options)], check=True)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32, help="rows in one of the harness's batches")
    parser.add_argument("--model", default="")
    parser.add_argument("--side", choices=("ours", "theirs"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    items = list(range(0, 10042, 10042 // arguments.items))[: arguments.items]
    if arguments.side:
        side = {"ours": ours, "theirs": theirs}[arguments.side]
        found = side(arguments.model, items, arguments.shots, arguments.batch)
        found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        arguments.out.write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not arguments.model:
            arguments.model = str(folder / "model")
            export_teacher(Path(arguments.model))
        found = {side: in_own_process(side, arguments, folder) for side in ("ours", "theirs")}
    report(found["ours"], found["theirs"], len(items), arguments.shots)


def report(mine: dict[str, Any], other: dict[str, Any], items: int, shots: int) -> None:
    for name, side in (("ours", mine), ("lm-eval", other)):
        print(f"{name:<8} {items / side['seconds']:7.2f} items/s   peak {side['peak_gib']:.2f} GiB")
    print(f"{shots}-shot, {items} items: {other['seconds'] / mine['seconds']:.2f} times as fast, ", end="")
    print(f"{mine['peak_gib'] / other['peak_gib']:.2f} of the memory")
    gap = np.abs(np.array(mine["sum"]) - np.array(other["sum"])).max()
    print(f"largest difference of an ending's log-likelihood: {gap:.2e} nats")
    for metric in ("acc", "acc_norm"):
        differing = [i for i in range(items) if mine[metric][i] != other[metric][i]]
        near = sum(mine["gap"][i] < NEAR for i in differing)
        print(f"{metric}: {items - len(differing)} of {items} predictions identical ({near} others are near ties)")


if __name__ == "__main__":
    main()
