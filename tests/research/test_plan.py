"""The plan before the run against what runs have measured, and against the code that it speaks of."""

import json
import re
import sys
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from microlm.config import Config
from microlm.corpus.parts import GEMMA3_MODEL, OPT_IN, PARTS
from microlm.corpus.tokenizer import build_tokenizer
from microlm.errors import UserError
from microlm.files import read_json, read_yaml
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM, parameter_count
from microlm.objective.fused_head import fused_head_loss
from microlm.objective.schedule import Objective
from microlm.objective.vocabulary_blocks import COLUMNS, SIZES, SPARE, layout_of
from microlm.parameters import BatchConfig
from microlm.research.plan.estimate import Machine, config_of_scale, machine_of, make_plan
from microlm.research.plan.page import page, size
from microlm.research.plan.sizes import KNOWN_TEACHERS, VOCABULARIES, forward_flops, teacher_shape
from microlm.training.memory import FLOAT32, Precision, activation_bytes, optimizer_bytes, training_memory
from microlm.training.optimizer import Optimizers
from tests.support.clones import ROOT, Clone
from tests.support.tiny_candidates import microlm
from tests.support.tiny_teacher import tiny_llama
from tests.support.workspace import inside

SCALES = ("laptop", "study", "one-gpu", "gpt2-124m")
WITHIN = 0.1


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def configured(scale: str | None) -> Config:
    """`config_of_scale` in the top folder, a copy of its own: to read params.yaml takes longer than to plan."""
    return deepcopy(_read_once(scale))


_read_once = cache(config_of_scale)


def laptop(gpus: int = 1) -> dict[str, Any]:
    return make_plan(configured("laptop"), Machine(gpus))


def measured(name: str) -> dict[str, Any]:
    return read_json(ROOT / f"metrics/{name}.json", name)


# --- against the committed laptop run -------------------------------------------------------------------------------


def locked_sizes() -> dict[str, int]:
    """Bytes of every output in dvc.lock."""
    stages = read_yaml(ROOT / "dvc.lock", "run dvc repro", "")["stages"]
    return {out["path"]: out["size"] for stage in stages.values() for out in stage.get("outs", ())}


@pytest.mark.parametrize(
    "path", ["data/shards", "data/teacher", "models/start", "models/control", "models/continued", "models/student"]
)
def test_bytes_are_those_of_the_laptop_run(path: str) -> None:
    assert laptop()["bytes"][path] == pytest.approx(locked_sizes()[path], rel=WITHIN)


@pytest.mark.parametrize(
    ("stage", "metrics"),
    [("pretrain", "control"), ("continue", "continued"), ("distill", "student"), ("teacher", "teacher")],
)
def test_peak_memory_is_that_of_the_laptop_run(stage: str, metrics: str) -> None:
    planned = laptop()["memory"][stage]
    resident = planned["cpu"] + planned.get("mapped", 0)  # this machine had room for both
    assert resident == pytest.approx(measured(metrics)["peak_memory_bytes"], rel=WITHIN)


def test_tokens_steps_and_parameters_are_those_of_the_laptop_run() -> None:
    plan, run = laptop(), measured("tokenize")
    assert plan["tokens"]["train"] == pytest.approx(run["train"]["tokens"], rel=WITHIN)
    assert plan["tokens"]["val"] == pytest.approx(run["val"]["tokens"], rel=WITHIN)
    assert plan["tokens"]["labelled"] == measured("teacher")["tokens"]
    assert plan["cache_bytes_per_token"] == measured("teacher")["bytes_per_token"]
    assert plan["teacher"]["parameters"] == measured("teacher")["parameters"]
    for stage, name in (("pretrain", "control"), ("continue", "continued"), ("distill", "student")):
        assert plan["stages"][stage]["steps"] == measured(name)["steps"]
        assert plan["stages"][stage]["tokens"] == measured(name)["tokens"]
    assert plan["student"]["parameters"] == measured("control")["parameters"]


def test_labelling_costs_what_the_summary_says_but_for_attention() -> None:
    plan, summary = laptop(), measured("summary")
    labelling = forward_flops(plan["teacher"]["multiplied"], 0, 0, 0) * plan["tokens"]["labelled"]
    distilling = 3 * forward_flops(plan["student"]["parameters"], 0, 0, 0) * plan["stages"]["distill"]["tokens"]
    assert labelling / distilling == pytest.approx(summary["teacher"]["labelling_to_distilling_flops"], rel=1e-5)


def test_live_teacher_costs_what_the_ledger_measured() -> None:
    # arithmetic at one utilisation of both models, and measured seconds: a machine's matrix unit serves the larger
    # model better, and a short capture waits for its kernels to be compiled
    ledger, met = measured("ledger"), laptop()["break_even"]
    assert 1 / 3 < met["live_over_cached"] / ledger["step"]["live_over_cached"] < 3
    assert 1 / 3 < met["epochs"] / ledger["break_even"]["epochs"] < 3
    assert abs(met["students"] - ledger["break_even"]["students"]) <= 2


# --- against the code -----------------------------------------------------------------------------------------------

SHAPES = st.builds(
    lambda layers, heads, head_dim, hidden, intermediate: ModelShape(
        n_vocab=1000,
        padded_vocab=1024,
        layers=layers,
        hidden_size=8 * hidden,
        heads=heads,
        head_dim=2 * head_dim,
        intermediate_size=8 * intermediate,
        context=64,
        rope_theta=1e4,
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 12), st.integers(1, 8), st.integers(2, 16),
)  # fmt: skip


def kept_bytes(model: StudentLM, rows: int, seq_len: int) -> int:
    """Bytes of all storages that autograd saves in the trunk's forward pass, the parameters' and buffers' apart."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.train().hidden(torch.zeros(rows, seq_len, dtype=torch.int64))
    found = sum(storage.nbytes() for storage in kept.values())
    assert hidden.requires_grad
    return found


@given(shape=SHAPES, rows=st.integers(1, 4), seq_len=st.integers(8, 64), narrow=st.booleans())
@settings(max_examples=25)
def test_activations_are_what_autograd_keeps(shape: ModelShape, rows: int, seq_len: int, narrow: bool) -> None:
    dtype = torch.bfloat16 if narrow else torch.float32
    model = StudentLM(shape).set_activation_dtype(dtype)
    planned = activation_bytes(shape, rows, seq_len, Precision(dtype.itemsize, False))
    turns = 2 * seq_len * shape.head_dim * dtype.itemsize if narrow else 0  # the rotary table, cast: one for all rows
    assert kept_bytes(model, rows, seq_len) == planned + turns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_activations_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    shape = ModelShape(1000, 1024, 2, 48, 2, 20, 112, 64, 1e4)
    model = StudentLM(shape).set_activation_dtype(dtype)
    model.compile_blocks()
    planned = activation_bytes(shape, 3, 16, Precision(dtype.itemsize, True))
    assert kept_bytes(model, 3, 16) == pytest.approx(planned, rel=0.03)


@given(shape=SHAPES, optimizer=st.sampled_from(["muon", "adamw"]))
@settings(max_examples=15)
def test_parameters_and_moments_are_the_optimizers(shape: ModelShape, optimizer: str) -> None:
    rates = replace(configured(None).at.pretrain, optimizer=optimizer)
    model = StudentLM(shape)
    optimizers = Optimizers(model, rates)
    hidden = model.hidden(torch.zeros(1, 4, dtype=torch.int64)).flatten(0, 1)
    fused_head_loss(
        hidden, model.head_weight, torch.zeros(4, dtype=torch.int64), shape.n_vocab, Objective()
    ).loss.backward()
    optimizers.step(1.0)
    held = sum(t.nbytes for name, t in optimizers.state_tensors().items() if not name.endswith("/step"))
    assert parameter_count(shape) == model.parameter_count()
    assert optimizer_bytes(shape, optimizer) == held
    assert sum(t.nbytes for t in model.parameters()) == FLOAT32 * parameter_count(shape)


def test_headline_student_has_its_parameters() -> None:
    assert make_plan(configured("gpt2-124m"), Machine())["student"]["parameters"] == 123_590_400


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies_are_the_tokenizers(name: str, parts: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(name, parts)
    tokenizer.save(tmp_path)
    assert VOCABULARIES[name].size == tokenizer.n_vocab
    assert VOCABULARIES[name].file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_directory_of_a_teacher_is_read(parts: Path, tmp_path: Path) -> None:
    model = tiny_llama(build_tokenizer("olmo", parts))
    model.save_pretrained(tmp_path)
    found = teacher_shape(str(tmp_path), None)
    assert found.parameters == found.multiplied == model.num_parameters()
    assert (found.layers, found.hidden_size, found.attention_width, found.intermediate_size) == (2, 32, 32, 64)


# --- laws -----------------------------------------------------------------------------------------------------------


@given(scale=st.sampled_from(SCALES), gpus=st.integers(1, 64), share=st.floats(0.01, 1), price=st.floats(0.01, 100))
@settings(max_examples=30)
def test_gpu_hours_are_flops_at_the_stated_speed(scale: str, gpus: int, share: float, price: float) -> None:
    plan = make_plan(configured(scale), Machine(gpus, 500.0, share, "as stated", price))
    for name, one in plan["stages"].items():
        busy = plan["busy_share"] if name in ("pretrain", "continue", "distill") else 1
        assert one["gpu_hours"] * 3600 * 500e12 * share == pytest.approx(one["flops"] / busy)
        assert one["price"] == pytest.approx(one["gpu_hours"] * price)
        assert one["hours"] * gpus == pytest.approx(one["gpu_hours"])
    assert 0 < plan["busy_share"] <= 1
    assert plan["break_even"]["epochs"] == 1  # at one speed, labelling once costs what one live epoch costs
    assert plan["break_even"]["students"] == 1


@given(rows=st.integers(1, 8), parts=st.integers(1, 8), gpus=st.integers(1, 8))
def test_more_gpus_never_take_more_memory_each(rows: int, parts: int, gpus: int) -> None:
    shape = ModelShape(50280, 50304, 12, 768, 6, 128, 2048, 1024, 1e4)
    batch = BatchConfig(seq_len=64, batch_tokens=64 * rows * parts, micro_batch_rows=rows)
    alone, many = (training_memory(batch, Precision(2, True), shape, "muon", n)["total"] for n in (1, gpus))
    assert many <= alone


@given(epochs=st.integers(1, 8), gpus=st.sampled_from([1, 2, 4, 8]))
def test_source_that_is_said_to_be_cheaper_is(epochs: int, gpus: int) -> None:
    config = configured("gpt2-124m")
    at = replace(config.at, continuation=replace(config.at.continuation, epochs=epochs))
    plans = {
        source: make_plan(replace(config, at=replace(at, teacher=replace(at.teacher, source=source))), Machine(gpus))
        for source in ("cache", "live")
    }
    told = plans["cache"]["sources"]
    assert told == plans["live"]["sources"]

    def spent(source: str, students: int) -> float:
        once, each = told["cache"]["gpu_hours"], told["live"]["gpu_hours_a_student"]
        return once if source == "cache" else students * each

    turn = told["students_to_turn"]
    assert spent("cache", turn) < spent("live", turn)
    assert turn == 1 or spent("cache", turn - 1) >= spent("live", turn - 1) * (1 - 1e-9)
    cheaper = min(
        ("live", "cache"), key=lambda source: round(spent(source, 1), 9)
    )  # at equal hours the one without a disk
    assert told["cheaper_for_one_student"] == cheaper
    # what the stages' own rows say of the two
    extra = {s: sum(plans[s]["stages"][n]["gpu_hours"] for n in ("teacher", "distill")) for s in plans}
    whole_steps = 1e-3 * spent("live", 1)  # the windows that do not fill a step are labelled, and not trained on
    assert extra["live"] - extra["cache"] == pytest.approx(spent("live", 1) - spent("cache", 1), abs=whole_steps)
    assert plans["cache"]["bytes"]["data/teacher"] > 1e11 > 1e6 > plans["live"]["bytes"]["data/teacher"]


def test_one_gpu_fits_24_gb_and_the_headline_record_140_bytes() -> None:
    plan = make_plan(configured("one-gpu"), Machine())
    slack = 2e9  # CUDA's context and the allocator's
    assert max(one["total"] for one in plan["memory"].values()) + slack < 24e9
    assert sum(one["hours"] for one in plan["stages"].values()) < 8
    headline = make_plan(configured("gpt2-124m"), Machine())
    assert headline["cache_bytes_per_token"] <= 140 and plan["cache_bytes_per_token"] <= 140


@given(rows=st.integers(1, 2**17), n_vocab=st.integers(1, 2**18), device=st.sampled_from(["cpu", "cuda"]))
def test_logits_that_are_held_stay_within_bounds(rows: int, n_vocab: int, device: str) -> None:
    layout, sizes = layout_of(rows, n_vocab, device), SIZES[device]
    slack = rows * (COLUMNS + 2 * SPARE)  # a block has whole columns, however many rows there are
    assert 1 <= layout.width <= layout.row and rows * layout.row < 2**31  # what an int32 can index
    assert rows * layout.width <= sizes.block + slack
    held = layout.elements(rows, n_vocab)
    blocks = -(-n_vocab // layout.width)
    assert held <= (sizes.kept if layout.kept else sizes.block) + blocks * slack
    assert layout.kept == (rows * n_vocab <= sizes.kept)


# --- measured cards -------------------------------------------------------------------------------------------------


def card_file(folder: Path, name: str, **content: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def test_measured_card_takes_the_place_of_the_assumed_one(tmp_path: Path) -> None:
    assert machine_of(None, tmp_path) == Machine()
    card_file(tmp_path, "h100", peak_tflops=700.0, utilisation=0.5)
    card_file(tmp_path, "cut-short", peak_tflops=700.0)
    assert (machine_of(None, tmp_path).peak_tflops, machine_of(None, tmp_path).utilisation) == (700.0, 0.5)
    assert "assumed" not in page(make_plan(configured("one-gpu"), machine_of(None, tmp_path)))
    card_file(tmp_path, "a100", peak_tflops=250.0, utilisation=0.4)
    assert machine_of(None, tmp_path) == Machine()  # which of the two is meant is not known
    assert machine_of("a100", tmp_path).peak_tflops == 250.0
    with pytest.raises(UserError, match="--card: 'b200' was not measured; known: a100, h100"):
        machine_of("b200", tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"peak_tflops": "fast", "utilisation": 0.4}', '{"peak_tflops": 700, "utilisation": 40}']
)
def test_damaged_card_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "h100.json").write_text(content)
    with pytest.raises(UserError, match=r"h100\.json.*make gpu") as told:
        machine_of(None, tmp_path)
    assert "\n" not in str(told.value)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Without data and without teachers of its own."""
    return Clone(tmp_path_factory.mktemp("clone"))


def test_command_prints_page_and_json(clone: Clone) -> None:
    command = [sys.executable, "-m", "microlm", "plan", "--scale", "gpt2-124m", "--gpus", "8"]
    with inside(clone.directory):
        printed = microlm(*command[3:]).out
    plan = make_plan(configured("gpt2-124m"), replace(machine_of(None), gpus=8))
    assert printed.startswith(page(plan)) and printed.splitlines()[-2].startswith("disk here: ")
    found = json.loads(clone.run(*command, "--json").stdout)
    assert found.pop("disk")["needed"] == sum(plan["bytes"].values())
    assert found == json.loads(json.dumps(plan))
    assert not (clone.directory / "data" / "parts").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--scale", "nope"], "--scale: 'nope' is not a scale of params.yaml; choose one of laptop, study"),
        (["--gpus", "0"], "--gpus: 0 is not a number above 0"),
        (["--utilisation", "nan"], "--utilisation: nan is not a number above 0"),
        (["--utilisation", "40"], "--utilisation: 40 is more than the whole"),
        (["--card", "abacus"], "--card: 'abacus' was not measured; known: "),
        (["--price-per-gpu-hour", "-1"], "--price-per-gpu-hour: -1.0 is not a number above 0"),
        (["--scale", "smoke"], "teacher.model: data/tiny-teacher is no folder here"),
    ],
)
def test_mistakes_are_one_line(clone: Clone, arguments: list[str], told: str) -> None:
    with inside(clone.directory):
        said = microlm("plan", *arguments)
    assert said.code == 1 and said.out == ""
    assert said.err.startswith(f"error: {told}") and len(said.err.splitlines()) == 1


def test_broken_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "params.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(text.replace("alpha: 0.5 ", "alpha: much "))
    with pytest.raises(UserError, match=r"params\.yaml: alpha: 'much'"):
        config_of_scale("laptop")
    (tmp_path / "params.yaml").write_text(text.replace("temperature: 1.0 ", "temperature: 2.0 "))
    with pytest.raises(UserError, match="temperature: 2 is not captured"):
        config_of_scale("gpt2-124m")


def test_smoke_is_planned_once_its_teacher_is_told() -> None:
    plan = make_plan(configured("smoke"), Machine(), 10**6)
    assert plan["stages"]["pretrain"]["steps"] == 20
    assert "shape unknown" in page(plan)


def test_objective_that_samples_is_not_planned() -> None:
    with pytest.raises(UserError, match="minillm"):
        make_plan(replace(configured(None), objective="minillm"), Machine())


def test_known_teachers_are_those_of_the_scales() -> None:
    assert {configured(scale).at.teacher.model for scale in SCALES} | {GEMMA3_MODEL} == set(KNOWN_TEACHERS)


def test_gemma_is_planned_as_it_is_built_and_its_projected_records_as_they_are_laid_out() -> None:
    shape, config = KNOWN_TEACHERS[GEMMA3_MODEL], configured("laptop")
    built = Gemma3TextConfig(
        vocab_size=shape.padded_vocab,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=shape.attention_width // 4,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        assert shape.parameters == shape.multiplied == Gemma3ForCausalLM(built).num_parameters()
    plain = make_plan(config, Machine())
    teacher = replace(config.at.teacher, model=GEMMA3_MODEL)
    planned = make_plan(replace(config, start="fresh", at=replace(config.at, teacher=teacher)), Machine())
    # ids and log-probabilities at each temperature, and a mark
    assert planned["cache_bytes_per_token"] == 2 * (64 * (2 + 2) + 4) + 1 + 4
    assert planned["cache_bytes_per_token"] > plain["cache_bytes_per_token"]
    fetched = 2 * sum(PARTS[name].bytes for name in OPT_IN)
    assert planned["bytes"]["data/parts"] - plain["bytes"]["data/parts"] == fetched
    assert "teacher's weights" not in planned["bytes"]


def test_docs_show_the_page() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    shown = text.split("<!-- plan:begin -->\n```\n")[1].split("```\n<!-- plan:end -->")[0]
    assert shown == page(make_plan(configured("gpt2-124m"), replace(machine_of(None), gpus=8)))


def test_docs_show_the_hours_and_memory_of_one_gpu() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    config = configured("one-gpu")
    plans = [make_plan(config, Machine(1, peak, 0.4, "")) for peak in (989.0, 312.0, 165.0)]
    hours = [sum(one["hours"] for one in plan["stages"].values()) for plan in plans]
    assert f"| all | | {' | '.join(f'**{one:.1f} h**' for one in hours)} | not run |" in text
    for rows in (8, 16, 32, 64):
        at = replace(config.at, batch=replace(config.at.batch, micro_batch_rows=rows))
        live, cached = (
            make_plan(replace(config, at=replace(at, teacher=replace(at.teacher, source=source))), Machine())["memory"]
            for source in ("live", "cache")
        )
        totals = (live["pretrain"], live["distill"], cached["distill"])
        told = " | ".join(size(one["total"]) for one in totals)
        assert re.search(rf"\| {rows}(, as committed)? \| {re.escape(told)} \|", text)
