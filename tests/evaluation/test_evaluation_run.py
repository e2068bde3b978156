"""Promises of a run over several tasks: each stands by itself, none is lost, none is taken for another."""

import json
import math
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from microlm.config import load_config
from microlm.evaluation.candidates import load_candidate
from microlm.evaluation.results.store import read_result
from microlm.evaluation.run import score_benchmark
from microlm.evaluation.tasks.benchmarks import benchmarks, gather
from microlm.evaluation.tasks.task import TASKS
from microlm.files import SUMS
from stages.evaluate import _benchmarks
from tests.support.tiny_candidates import (
    as_others_export,
    command,
    evaluate,
    finished,
    microlm,
    repository,
    save_tiny_student,
)

STUDENT = Path("models/student")
SHORT, LONG = 128, 512  # positions


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def stamps(out: Path) -> dict[str, tuple[int, bytes]]:
    """When each file was written, and what it holds."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*.*") if path.is_file()}


def test_a_task_without_data_is_said_everywhere_and_the_others_are_scored(tmp_path: Path) -> None:
    said = microlm("evaluate", STUDENT, "--tasks", "snli,cb,qnli", "--limit", "8", "--offline", "--out", tmp_path)
    assert said.code == 0 and said.out.count("data not available: ") == 2
    assert "snli: data not available: the hub is not allowed; connect" in " ".join(said.out.split())
    for task in ("snli", "qnli"):
        (path,) = tmp_path.rglob(f"{task}.*")
        content = json.loads(path.read_text())
        assert content["unavailable"].startswith(f"{task}: ") and "metrics" not in content
    assert read_result(next(tmp_path.rglob("cb.*.json"))).metrics["items"] == 8


def test_the_pipelines_summary_names_what_had_no_data(tmp_path: Path) -> None:
    config = load_config()
    asked = replace(config.at.evaluation.benchmarks[0], tasks=["cola", "cb"], protocol=None, shots=0, items=8)
    settings = replace(config.at.evaluation, benchmarks=[asked], data=None, hub=False)
    candidate = load_candidate(str(STUDENT), None, torch.float32)
    found = _benchmarks(candidate, replace(config, at=replace(config.at, evaluation=settings)), tmp_path)
    assert found["cola"]["lm-eval"]["0-shot"]["status"] == "data not available"
    assert found["cb"]["lm-eval"]["0-shot"]["items"] == 8


def test_every_task_is_scored_from_its_published_file(tmp_path: Path) -> None:
    assert evaluate("models/student", tmp_path, "--tasks", "all", "--limit", "3").code == 0
    found = {result.identity.task: result for result in map(read_result, tmp_path.rglob("*.json"))}
    assert set(found) == set(TASKS) and all(result.metrics["items"] == 3 for result in found.values())


def test_what_is_longer_than_the_context_loses_its_start_and_is_counted(tmp_path: Path) -> None:
    for context in (SHORT, LONG):
        save_tiny_student(tmp_path / str(context), context=context)
    short, whole = (load_candidate(str(tmp_path / str(context)), None, torch.float32) for context in (SHORT, LONG))
    (material,) = gather(benchmarks(["hellaswag"], "completion", [0], 40), None, hub=False)
    cut = score_benchmark(short, material, 2048)
    expected, asked = 0, []
    for question in material.questions:
        context, *endings = short.tokenizer.encode_batch([question.context, *question.endings])
        room = SHORT - max(map(len, endings)) + 1
        expected += len(context) > room
        asked.append((np.asarray(context[-room:]), [np.asarray(ending) for ending in endings]))
    assert cut.metrics["truncated"] == expected and 0 < expected < 40
    assert score_benchmark(whole, material, 2048).metrics["truncated"] == 0
    for row, (context, endings) in zip(cut.table.itertuples(), asked):
        ids = torch.from_numpy(np.concatenate([context, endings[0]]).astype(np.int64))[None]
        with torch.inference_mode():
            log_p = whole.model.logits(whole.model.hidden(ids))[0, :-1, : whole.model.n_vocab].log_softmax(-1)
        nats = -log_p.gather(1, ids[0, 1:, None])[len(context) - 1 :].sum()
        assert row.nats_0 == pytest.approx(float(nats), abs=1e-3)


def test_scores_that_are_no_numbers_are_refused_and_not_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    as_others_export(Path(STUDENT), broken)  # our own are refused when they are read
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = evaluate(str(broken), tmp_path / "out", "--tasks", "cb,rte", "--limit", "8")
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.code == 1 and "Traceback" not in said.err
    assert "broken gives cb question" in line and "not a finite number: its weights are broken" in line
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_scored_again_and_nothing_else_is_taken_for_it(tmp_path: Path) -> None:
    model, asked = tmp_path / "model", ("--tasks", "cb", "--limit", "8")
    shutil.copytree(STUDENT, model)
    (model / SUMS).unlink()

    def run(*changed: str) -> tuple[bool, dict[str, tuple[int, bytes]]]:
        said = evaluate(str(model), tmp_path / "out", *asked, *changed)
        assert said.code == 0, said.err
        return "cb (" in said.err and "was there already" in said.err, stamps(tmp_path / "out")

    stood, first = run()
    assert not stood and len(first) == 2
    assert run() == (True, first)
    assert run("--limit", "9")[0] is run("--protocol", "infill")[0] is run("--shots", "1")[0] is False
    assert run() == (True, stamps(tmp_path / "out")) and first.items() <= stamps(tmp_path / "out").items()
    assert run("--dtype", "bfloat16")[0] is False
    assert run()[0] is False  # the float32 result has gone
    shutil.copy("models/second/model.safetensors", model)
    assert run()[0] is False and run()[0] is True
    definition = json.loads((model / "tokenizer.json").read_text())
    ids = definition["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (model / "tokenizer.json").write_text(json.dumps(definition))
    assert run()[0] is False and run()[0] is True


def test_pmi_that_is_asked_for_is_scored_although_the_rest_is_there(tmp_path: Path) -> None:
    asked = ("--tasks", "hellaswag", "--limit", "8")
    first = evaluate("models/student", tmp_path, *asked)
    assert first.code == 0 and "was there" not in evaluate("models/student", tmp_path, *asked, "--pmi").err
    assert "pmi" in read_result(next(tmp_path.rglob("*.json"))).metrics["normalisers"]


def test_an_interrupted_run_leaves_whole_files_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    tasks = ("cb", "rte", "mrpc")
    asked = ("evaluate", STUDENT, "--offline", "--tasks", ",".join(tasks), "--out")
    process = command(*asked, tmp_path / "cut")
    while not list(tmp_path.glob("cut/*/cb.*.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = finished(process)
    told = f"error: interrupted; finished tasks are kept in {tmp_path / 'cut'}; run the same command again to go on"
    assert said.code == 130 and said.err.splitlines()[-1] == told and "Traceback" not in said.err
    left = stamps(tmp_path / "cut")
    done = [read_result(path) for path in tmp_path.glob("cut/*/*.json")]
    assert 0 < len(done) < len(tasks) and not [name for name in left if name.endswith(".tmp")]
    assert microlm(*asked, tmp_path / "cut").err.count("was there already") == len(done)
    assert microlm(*asked, tmp_path / "whole").code == 0
    kept = {f"{result.identity.task}.lm-eval.0shot.json" for result in done}
    assert {name: stamps(tmp_path / "cut")[name] for name in kept} == {name: left[name] for name in kept}
    for path in tmp_path.glob("whole/*/*.json"):
        whole, resumed = read_result(path), read_result(tmp_path / "cut" / path.relative_to(tmp_path / "whole"))
        assert whole.identity == resumed.identity and whole.metrics["acc"] == resumed.metrics["acc"]
        pd.testing.assert_frame_equal(whole.table, resumed.table, rtol=1e-4)
