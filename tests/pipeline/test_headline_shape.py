"""`scale: gpt2-124m` starts: its whole pipeline on the CPU, in its real shape, against local stand-ins for the hub."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from microlm.config import load_config
from microlm.corpus.tokenizer import build_tokenizer
from microlm.files import atomic_directory, read_json
from microlm.models.model_files import load_student
from microlm.research.plan.estimate import Machine, make_plan
from tests.support.clones import ROOT, Clone
from tests.support.forked_python import forked_python
from tests.support.soak import LONG
from tests.support.tiny_teacher import CONTEXT, tiny_llama

WHEELS = ROOT / ".resume" / "wheels"
PARAMETERS = 123_590_400
HEADLINE = "scales.gpt2-124m."
# the hub's text and teacher by local ones, and few of everything; the model's shape is left alone
STAND_INS = {
    "corpus.source": "files",
    "+corpus.paths": "[tests/fixtures/documents.jsonl]",
    "corpus.validation_fraction": "0.1",
    "corpus.train_tokens": "null",
    "batch.seq_len": "64",
    "batch.batch_tokens": "256",
    "batch.micro_batch_rows": "2",
    "pretrain.tokens": "768",
    "pretrain.evaluate_every": "2",
    "pretrain.validation_windows": "4",
    "pretrain.hellaswag_items": "4",
    "teacher.model": "data/olmo-stand-in",
    "teacher.revision": "null",
    "teacher.windows": "8",
    "teacher.batch_rows": "4",
    "continuation.evaluate_every": "2",
    "continuation.validation_windows": "4",
    "continuation.hellaswag_items": "4",
    "on_policy.prompts": "2",
    "evaluation.hub": "false",
    "evaluation.benchmarks": "[{tasks:[hellaswag],protocol:completion,shots:0,items:4}]",
    "evaluation.batch_tokens": "1024",
    "runtime.compile": "'off'",  # a C++ compiler's minutes for six steps
}


def overrides(**more: str) -> list[str]:
    """Arguments of `dvc exp run`."""
    given = {"scale": "gpt2-124m"}
    for key, value in (STAND_INS | more).items():
        given[f"+{HEADLINE}{key[1:]}" if key.startswith("+") else HEADLINE + key] = value
    return [word for key, value in given.items() for word in ("-S", f"{key}={value}")]


def started(directory: Path, parts: Path, python: Path = Path(sys.executable)) -> Clone:
    """A clone with a tiny random teacher under OLMo's tokenizer, its vocabulary padded as OLMo's is."""
    clone = Clone(directory, python)
    WHEELS.mkdir(parents=True, exist_ok=True)
    (directory / ".resume").mkdir()
    (directory / ".resume" / "wheels").symlink_to(WHEELS)
    tokenizer = build_tokenizer("olmo", parts)
    with (directory / "data" / ".gitignore").open("a") as ignored:
        ignored.write("/olmo-stand-in\n")
    with atomic_directory(directory / "data" / "olmo-stand-in") as folder:
        tiny_llama(tokenizer).save_pretrained(folder, safe_serialization=True)
        tokenizer.save(folder, model_max_length=CONTEXT)
    clone.commit("a stand-in for the teacher")
    return clone


def assert_loads_in_transformers(directory: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = load_student(directory).eval()
    tokens = torch.arange(3, 43)[None] * 7
    with torch.no_grad():
        expected = theirs(tokens).logits[..., : ours.n_vocab]
        assert torch.allclose(ours.logits(ours.hidden(tokens)), expected, atol=1e-4)


@LONG
def test_headline_scale_runs_to_its_report_on_the_cpu(tmp_path: Path, parts: Path) -> None:
    clone = started(tmp_path, parts)
    clone.dvc("exp", "run", "check", *overrides())
    for stage in ("fetch", "tokenize", "outside", "start", "pretrain", "teacher", "select", "distill", "continue_"):
        clone.run(sys.executable, "-m", f"stages.{stage}")
    for name in ("control", "continued", "student", "teacher"):
        clone.run(sys.executable, "-m", "stages.evaluate", name)
    clone.run(sys.executable, "-m", "stages.compare")
    for name in ("control", "continued", "student"):
        assert read_json(tmp_path / f"metrics/{name}.json", name)["parameters"] == PARAMETERS
        assert_loads_in_transformers(tmp_path / "models" / name)
    assert read_json(tmp_path / "metrics/summary.json", "compare")["student"]["parameters"] == PARAMETERS
    with safe_open(tmp_path / "models/control/model.safetensors", "pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == PARAMETERS  # noqa: SIM118
    plan = make_plan(load_config(tmp_path / "params.yaml"), Machine(), 10**6)
    for name in ("models/control", "models/student"):
        size = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        assert size == pytest.approx(plan["bytes"][name], rel=0.01)
    measured = read_json(tmp_path / "metrics/control.json", "pretrain")["peak_memory_bytes"]
    assert plan["memory"]["pretrain"]["cpu"] == pytest.approx(measured, rel=0.1)


def test_headline_scale_with_one_narrow_layer_starts(tmp_path: Path, parts: Path) -> None:
    """Everything but the width is the headline's: the same tokenizer, vocabulary and stand-ins."""
    narrow = {"model.layers": "1", "model.hidden_size": "32", "model.heads": "1", "model.head_dim": "32"}
    narrow |= {"model.intermediate_size": "64"}
    clone = started(tmp_path, parts, forked_python())
    clone.dvc("exp", "run", "check", *overrides(**narrow))
    for stage in ("fetch", "tokenize", "outside", "start", "pretrain"):
        clone.run(clone.python, "-m", f"stages.{stage}")
    manifest = read_json(tmp_path / "data/shards/manifest.json", "tokenize")
    assert manifest["tokenizer"]["n_vocab"] == 50_280
    assert read_json(tmp_path / "models/control/config.json", "pretrain")["vocab_size"] == 50_304
    assert_loads_in_transformers(tmp_path / "models/control")
