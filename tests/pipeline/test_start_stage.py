"""Stage `start` and what begins at models/start, through the real stages at scale `smoke`."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from microlm.corpus.tokenizer import load_tokenizer
from microlm.files import read_json
from microlm.models.model_files import load_student
from microlm.models.start_request import PACKAGED, known_shape, pruned_shape
from microlm.models.student import parameter_count
from microlm.pipeline.start import fresh_student
from microlm.research.plan.sizes import KNOWN_TEACHERS
from tests.support.tiny_run import (
    CONTINUE,
    DISTILL,
    PRETRAIN,
    START,
    changed,
    contents,
    finish,
    remove_outputs,
    run,
)
from tests.support.workspace import config_of


def weights(directory: Path, name: str) -> dict[str, torch.Tensor]:
    return load_student(directory / "models" / name).state_dict()


def again(directory: Path, *stages: object) -> None:
    for stage in stages:
        remove_outputs(stage, directory)
        finish(stage, directory)


def test_fresh_start_is_the_seeds(whole: Path) -> None:
    tokenizer, config = load_tokenizer(whole / "data/shards/tokenizer"), config_of(whole)
    fresh = fresh_student(config, tokenizer)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in weights(whole, "start").items())
    told = read_json(whole / "metrics/start.json", "start")
    assert told["start"] == "fresh" and told["parameters"] == fresh.parameter_count()
    curve = pd.read_csv(whole / "plots/loss/control.csv")
    assert told["val_bpb"] == pytest.approx(curve["val_bpb"][0], abs=1e-6)  # before any step


@pytest.mark.parametrize("start", ["embedding", "pruned"])
def test_every_arm_begins_at_the_start(start: str, whole: Path, tmp_path: Path) -> None:
    """alpha 0 is `continued` bit for bit, from the control and from the start itself; both move."""
    directory = changed(whole, tmp_path / start, start=start, alpha="0.0")
    again(directory, START, PRETRAIN)
    told = read_json(directory / "metrics/start.json", "start")
    assert told["start"] == start
    begun, trained = weights(directory, "start"), weights(directory, "control")
    assert begun.keys() == trained.keys()
    assert all((tensor != trained[name]).any() for name, tensor in begun.items())
    for init in ("control", "scratch"):
        text = (directory / "params.yaml").read_text()
        (directory / "params.yaml").write_text(re.sub(r"(?m)^init: \S+", f"init: {init}", text))
        again(directory, CONTINUE, DISTILL)
        continued, student = weights(directory, "continued"), weights(directory, "student")
        assert all(torch.equal(continued[name], student[name]) for name in continued)
        first = pd.read_csv(directory / "plots/loss/continued.csv").iloc[0]
        control = read_json(directory / "metrics/control.json", "pretrain")
        assert first["val_bpb"] == pytest.approx((told if init == "scratch" else control)["val_bpb"], abs=1e-6)


def test_pruned_start_is_some_of_the_teacher(whole: Path, tmp_path: Path) -> None:
    directory = changed(whole, tmp_path / "pruned", start="pruned")
    again(directory, START)
    told = read_json(directory / "metrics/start.json", "start")
    table = pd.read_csv(directory / "plots/start.csv")
    assert told["layers"] == table.loc[table["kept"] == 1, "layer"].tolist() and len(told["layers"]) == 1
    assert told["layers"] == [int(table["influence"].idxmax())]
    assert 0 < told["kept"] < 1
    kept = load_student(directory / "models/start")
    asked = config_of(directory).at
    assert kept.shape == pruned_shape(asked.start, known_shape(str(directory / asked.teacher.model), kept.n_vocab))
    teacher = load_file(directory / asked.teacher.model / "model.safetensors")
    layer = f"model.layers.{told['layers'][0]}.self_attn.q_proj.weight"
    assert torch.equal(kept.state_dict()["model.layers.0.self_attn.q_proj.weight"], teacher[layer])
    assert (directory / "plots/start.png").read_bytes()[:4] == b"\x89PNG"
    once = contents(directory, START.outputs)
    again(directory, START)
    assert contents(directory, START.outputs) == once


def test_start_of_another_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    directory = changed(whole, tmp_path / "other", start="pruned")
    path = directory / "data/tiny-teacher/tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(definition))
    status, said = run(START, directory)
    assert status == 1 and "has another tokenizer than data/shards" in said and said.count("error") == 1, said


def test_shape_of_the_packaged_teacher_is_known_before_it_is_there() -> None:
    shape = known_shape("packaged", 49_152)
    assert (shape.layers, shape.kv_heads) == (PACKAGED["num_hidden_layers"], PACKAGED["num_key_value_heads"])
    assert parameter_count(shape) == KNOWN_TEACHERS["packaged"].parameters
