"""params.yaml is checked at the door: one line names the file, the key and the mend, and never a traceback."""

import copy
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from microlm.config import Config, ConfigError, load_config
from microlm.errors import UserError, plain
from microlm.models.start_request import check_start, known_shape
from tests.support.clones import ROOT

PARAMS = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
# read in a third of the time
ONE_SCALE = {**PARAMS, "scale": "laptop", "scales": {"laptop": PARAMS["scales"]["laptop"]}}
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Keys = tuple[str, ...]


def paths(block: dict[str, Any], above: Keys = ()) -> Iterator[Keys]:
    """Every key of the nested mapping, blocks and leaves."""
    for key, value in block.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def with_value(keys: Keys, value: Any, of: dict[str, Any] = PARAMS) -> dict[str, Any]:
    """The committed parameters with one value replaced or added."""
    params = copy.deepcopy(of)
    block = params
    for key in keys[:-1]:
        block = block[key]
    block[keys[-1]] = value
    return params


def written(tmp_path: Path, params: dict[str, Any]) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(as_yaml(params), encoding="utf-8")
    return path


def as_yaml(block: dict[str, Any], indent: str = "") -> str:
    """In block style: key by key, of which most are the same in every test, and ruamel is slow to write one."""
    text = ""
    for key, value in sorted(block.items()):
        if isinstance(value, dict) and value and KNOWN.issuperset(value):
            text += f"{indent}{key}:\n{as_yaml(value, indent + '  ')}"
        else:
            text += indent + dumped(key, value).rstrip("\n").replace("\n", f"\n{indent}") + "\n"
    return text


def dumped(key: str, value: Any) -> str:
    known_by = repr((key, value))
    if known_by not in DUMPED:
        stream = io.StringIO()
        writer = YAML(typ="safe", pure=True)
        writer.default_flow_style = False  # in flow style it writes `{:0: 1}` for the key ":0", and cannot read that
        writer.dump({key: value}, stream)
        DUMPED[known_by] = stream.getvalue()
    return DUMPED[known_by]


KNOWN = {keys[-1] for keys in paths(PARAMS)}
DUMPED: dict[str, str] = {}


def complaint(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).split("\n")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from numbers(getattr(value, name))


def test_committed_parameters_are_accepted_at_every_scale(tmp_path: Path) -> None:
    for scale in PARAMS["scales"]:
        params = with_value(("scale",), scale)
        params["temperature"] = 1.0
        config = load_config(written(tmp_path, params))
        assert config.scale == scale
        assert config.at.batch.rows * config.at.batch.seq_len == config.at.batch.batch_tokens


LAPTOP = ("scales", "laptop")
BAD = {
    "unknown key": (("alpa",), 0.2, "alpa", "unknown key"),
    "unknown key in a block": ((*LAPTOP, "pretrain", "learning_rat"), 1e-3, "learning_rat", "known here: optimizer"),
    "text for a number": (("alpha",), "high", "alpha", "not a number"),
    "number read as text": ((*LAPTOP, "pretrain", "learning_rate"), "6e-4", "learning_rate", "write 0.0006"),
    "text for a whole number": ((*LAPTOP, "teacher", "top_k"), "many", "top_k", "write it as digits"),
    "fraction for a whole number": ((*LAPTOP, "teacher", "top_k"), 64.0, "top_k", "write 64"),
    "boolean for a number": (("seed",), True, "seed", "not a whole number"),
    "list for a number": (("alpha",), [0.1, 0.2], "alpha", "not a number"),
    "nothing for a number": (("alpha",), None, "alpha", "not a number"),
    "alpha below its range": (("alpha",), -0.1, "alpha", "at least 0 and at most 1"),
    "alpha above its range": (("alpha",), 1.1, "alpha", "at least 0 and at most 1"),
    "alpha is not a number": (("alpha",), math.nan, "alpha", ""),
    "alpha is infinite": (("alpha",), math.inf, "alpha", ""),
    "negative seed": (("seed",), -1, "seed", "out of range"),
    "temperature of zero": (("temperature",), 0.0, "temperature", "more than 0"),
    "temperature that is not captured": (("temperature",), 7.0, "temperature", "teacher.temperatures"),
    "final alpha above its range": (("alpha_final",), 1.5, "alpha_final", "at least 0 and at most 1"),
    "unknown schedule of alpha": (("alpha_schedule",), "step", "alpha_schedule", "one of constant"),
    "beta at the end that is forward KL": (("beta",), 0, "beta", "more than 0 and less than 1"),
    "beta at the end that is reverse KL": (("beta",), 1.0, "beta", "more than 0 and less than 1"),
    "skew of nothing": (("skew",), 0.0, "skew", "more than 0 and less than 1"),
    "skew of everything": (("skew",), 1, "skew", "more than 0 and less than 1"),
    "treatment that the cache cannot serve": (("tail",), "renormalize", "tail", "one of lumped, capped, table"),
    "unknown start": (("init",), "teacher", "init", "one of control, scratch"),
    "notebook without its temperature": (
        (*LAPTOP, "teacher", "temperatures"),
        [1.0],
        "objective: notebook",
        "teacher.temperatures",
    ),
    "minillm at another temperature": (("temperature",), 2.5, "temperature: minillm", "set temperature=1"),
    "windows without labels": ((*LAPTOP, "continuation", "windows"), "any", "continuation.windows", "alpha=0"),
    "selection of nothing": ((*LAPTOP, "continuation", "select_fraction"), 0.0, "select_fraction", "more than 0"),
    "more prompts than windows": ((*LAPTOP, "on_policy", "prompts"), 17, "on_policy.prompts", "micro_batch_rows"),
    "prompts longer than windows": ((*LAPTOP, "on_policy", "prompt_tokens"), 300, "prompt_tokens", "seq_len"),
    "responses beyond the context": ((*LAPTOP, "on_policy", "response_tokens"), 1000, "response_tokens", "context"),
    "sampling from the teacher alone": ((*LAPTOP, "on_policy", "teacher_mix"), 1.0, "teacher_mix", "less than 1"),
    "top_k of zero": ((*LAPTOP, "teacher", "top_k"), 0, "top_k", "out of range"),
    "unknown scale": (("scale",), "desktop", "scale", "choose one of"),
    "unknown objective": (("objective",), "kl", "objective", "one of rkl"),
    "unknown optimizer": ((*LAPTOP, "pretrain", "optimizer"), "adam", "optimizer", "muon"),
    "unknown source": ((*LAPTOP, "corpus", "source"), "web", "source", "packaged"),
    "files without paths": ((*LAPTOP, "corpus", "source"), "files", "paths", "name at least one"),
    "hub without revision": ((*LAPTOP, "corpus", "source"), "hub", "revision", "commit hash"),
    "windows longer than the context": ((*LAPTOP, "model", "context"), 128, "seq_len", "model.context=128"),
    "uneven accumulation": ((*LAPTOP, "batch", "batch_tokens"), 4097, "batch_tokens", "not a multiple"),
    "pretraining shorter than a step": ((*LAPTOP, "pretrain", "tokens"), 1, "pretrain.tokens", "less than one step"),
    "block that is a number": ((*LAPTOP, "pretrain"), 3, "pretrain", "block of keys"),
    "block that is empty": ((*LAPTOP, "pretrain"), None, "pretrain", "block of keys"),
    "scales that are a list": (("scales",), ["laptop"], "scales", "one block for each scale"),
    "mistake in a scale that is not chosen": (("scales", "smoke", "batch", "seq_len"), "x", "smoke.batch", "digits"),
}


@pytest.mark.parametrize(("keys", "value", "named", "mend"), BAD.values(), ids=BAD)
def test_bad_value_is_one_line_naming_file_key_and_mend(
    tmp_path: Path, keys: Keys, value: Any, named: str, mend: str
) -> None:
    params = with_value(keys, value, PARAMS if "smoke" in keys else ONE_SCALE)
    for objective in ("notebook", "minillm"):
        if objective in named:
            params["objective"] = objective
    path = written(tmp_path, params)
    [line] = complaint(path)
    assert line.startswith(f"{path}: ")
    assert named in line
    assert mend in line


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    params = with_value(("alpha",), "high")
    params["objective"] = "kl"
    params["scales"]["laptop"]["teacher"]["top_k"] = 0
    lines = complaint(written(tmp_path, params))
    assert [any(key in line for line in lines) for key in ("alpha", "objective", "top_k")] == [True] * 3
    assert len(lines) == 3


@pytest.mark.parametrize("keys", list(paths(ONE_SCALE)), ids=".".join)
def test_missing_key_is_named(tmp_path: Path, keys: Keys) -> None:
    params = copy.deepcopy(ONE_SCALE)
    block = params
    for key in keys[:-1]:
        block = block[key]
    del block[keys[-1]]
    try:
        load_config(written(tmp_path, params))
    except ConfigError as error:
        assert keys[-1] in str(error)
    else:
        # the only blocks whose keys may have a default, or name changes alone
        assert keys[-2] == "corpus" or keys[2:4] == ("start", "fresh")


@pytest.mark.parametrize(
    ("content", "mend"),
    [
        (b"", "must hold keys and values"),
        (b"- 1\n", "must hold keys and values"),
        (b"alpha: [1\n", "not readable as YAML"),
        (b"alpha: 1\nalpha: 2\n", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (b"scale: laptop\n", "scales"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, content: bytes, mend: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    [line] = complaint(path)
    assert line.startswith(str(path))
    assert mend in line


def test_absent_file_says_where_to_run(tmp_path: Path) -> None:
    [line] = complaint(tmp_path / "params.yaml")
    assert "top folder" in line


def test_check_stage_refuses_without_touching_its_output(tmp_path: Path) -> None:
    written(tmp_path, with_value(("alpha",), "high"))
    (tmp_path / "data").mkdir()
    accepted = tmp_path / "data" / "params.ok"
    accepted.write_text("before")
    command = [sys.executable, "-m", "stages.check"]
    ended = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: params.yaml: alpha: 'high' is not a number; write it as digits")
    assert accepted.read_text() == "before"


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(keys=st.sampled_from(list(paths(ONE_SCALE))), value=values)
def test_any_value_anywhere_is_accepted_in_range_or_refused_in_lines(tmp_path: Path, keys: Keys, value: Any) -> None:
    path = written(tmp_path, with_value(keys, value, ONE_SCALE))
    try:
        config = load_config(path)
    except ConfigError as error:
        assert all(line.startswith(f"{path}: ") for line in str(error).splitlines())
    else:
        assert isinstance(config, Config)
        assert all(math.isfinite(number) and number >= 0 for number in numbers(config))
        assert 0 <= config.alpha <= 1
        assert config.temperature in config.at.teacher.temperatures


SPELLINGS = st.sampled_from(
    [
        *(
            "0x" + "f" * 5000,
            "-0x" + "f" * 4000,
            "9" * 5000,
            "1e999999",
            ".inf",
            "-.nan",
            "~",
            "2001-01-01",
            "12:30:45",
        ),
        *("&a [*a]", "!!set {a}", "!!binary aGk=", "!!python/object/apply:os.system [ls]", "{1: 2}", "*b"),
        *(
            '"\\x1b[2J\\u202e"',
            "'\u2028'",
            "🦊",
            "x" * 10_000,
            "{0x" + "f" * 5000 + ": 1}",
            "null",
            "[]",
            "{}",
            "? a",
            "|",
        ),
    ]
)


@FUZZ
@given(data=st.data())
def test_any_spelling_of_yaml_anywhere_is_accepted_or_refused_in_short_lines(
    tmp_path: Path, data: st.DataObject
) -> None:
    """Several values, or the names of keys, at once."""
    lines = written(tmp_path, ONE_SCALE).read_text().splitlines()
    for place in data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=3)):
        lines[place] = data.draw(st.sampled_from(respelt(lines[place], data.draw(SPELLINGS))))
    accepted_or_refused_in_short_lines(tmp_path / "params.yaml", lines)


@pytest.mark.parametrize(("place", "of_the_key"), [(20, False), (20, True), (0, True)])
def test_nesting_beyond_any_depth_is_refused_in_short_lines(tmp_path: Path, place: int, of_the_key: bool) -> None:
    """A spelling as those above, but one that costs a second."""
    lines = written(tmp_path, ONE_SCALE).read_text().splitlines()
    lines[place] = respelt(lines[place], "[[" * 3000)[of_the_key]
    accepted_or_refused_in_short_lines(tmp_path / "params.yaml", lines)


def respelt(line: str, spelling: str) -> tuple[str, str]:
    """The line with another value, and with another key."""
    key, _, value = line.partition(":")
    indent = " " * (len(key) - len(key.lstrip()))
    return f"{key}: {spelling}", f"{indent}{spelling}:{value}"


def accepted_or_refused_in_short_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines))
    try:
        load_config(path)
    except ConfigError as error:
        told = str(error).split("\n")
        assert all(line.startswith(f"{path}: ") for line in told)
        assert all(len(plain(line)) < 1000 for line in told)


BLOCKS = [(), LAPTOP, (*LAPTOP, "corpus"), (*LAPTOP, "pretrain"), (*LAPTOP, "teacher")]
one_line = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=12)


@FUZZ
@given(keys=st.sampled_from(BLOCKS), key=one_line)
def test_any_unknown_key_is_refused_in_one_line(tmp_path: Path, keys: Keys, key: str) -> None:
    block: Any = ONE_SCALE
    for name in keys:
        block = block[name]
    if key in block:
        return
    [line] = complaint(written(tmp_path, with_value((*keys, key), 1, ONE_SCALE)))
    assert "unknown key" in line


@FUZZ
@given(content=st.binary(max_size=60) | st.text("[]{}:-?!&*|>#%@`'\" \n\tab01", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError as error:
        assert all(line.startswith(str(path)) for line in str(error).splitlines())


@FUZZ
@given(alpha=st.floats(0, 1), seed=st.integers(0, 2**63 - 1))
def test_accepted_numbers_arrive_unchanged(tmp_path: Path, alpha: float, seed: int) -> None:
    params = with_value(("alpha",), alpha, ONE_SCALE)
    params["seed"] = seed
    config = load_config(written(tmp_path, params))
    assert (config.alpha, config.seed) == (alpha, seed)


def test_exponents_are_numbers_however_dvc_writes_them(tmp_path: Path) -> None:
    # YAML 1.1 takes 1e-05 for a text; DVC writes `-S learning_rate=1e-5` so
    path = written(tmp_path, ONE_SCALE)
    text = path.read_text().replace("clip_norm: 1.0", "clip_norm: 1e-05")
    path.write_text(text)
    assert load_config(path).at.pretrain.clip_norm == 1e-5


LAPTOP = {**ONE_SCALE, "start": "auto"}


def test_a_start_in_the_students_own_shape_has_its_own_settings(tmp_path: Path) -> None:
    own = PARAMS["scales"]["laptop"]["start"]["fresh"]
    for start, changed in (("auto", False), ("pruned", False), ("fresh", True), ("embedding", True)):
        config = load_config(written(tmp_path, LAPTOP | {"start": start}))
        assert config.start_kind == ("pruned" if start == "auto" else start)
        for block, change in own.items():
            for key, value in change.items():
                assert getattr(getattr(config.at, block), key) == (
                    value if changed else PARAMS["scales"]["laptop"][block][key]
                )


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("start",), "cut", "start: 'cut' is not one of auto, fresh, embedding, pruned"),
        (("scales", "laptop", "start", "layers"), [1, "2"], "scales.laptop.start.layers: [1, '2'] is not"),
        (("scales", "laptop", "start", "layers"), 0, "scales.laptop.start.layers: 0 leaves no layer; keep at least 1"),
        (("scales", "laptop", "start", "heads"), 0, "scales.laptop.start.heads: 0 is out of range"),
        (
            ("scales", "laptop", "start", "fresh"),
            None,
            "scales.laptop.start.fresh: must hold blocks of keys and values",
        ),
        (("scales", "laptop", "start", "fresh", "modl"), {}, "scales.laptop.start.fresh.'modl': unknown block"),
        (
            ("scales", "laptop", "start", "fresh", "batch", "seq_len"),
            64,
            "scales.laptop.start.fresh.batch.seq_len: is the same for every start; remove it here",
        ),
        (
            ("scales", "laptop", "start", "fresh", "pretrain", "tokens"),
            "many",
            "scales.laptop.start.fresh.pretrain.tokens: 'many' is not a whole number",
        ),
        (
            ("scales", "laptop", "start", "fresh", "pretrain", "token"),
            9,
            "scales.laptop.start.fresh.pretrain.token: unknown key",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(keys: Keys, value: Any, said: str, tmp_path: Path) -> None:
    lines = complaint(written(tmp_path, with_value(keys, value, LAPTOP)))
    assert len(lines) == 1 and said in lines[0], lines


def checked_start(config: Config) -> None:
    with config.naming_keys():
        check_start(config.start_kind, config.at)


@pytest.mark.parametrize(
    ("start", "changes", "said"),
    [
        ("pruned", {"start.layers": 31}, "start.layers: 31 is more than the teacher's 30; lower it"),
        ("pruned", {"start.layers": [0, 30]}, "start.layers: 30 is none of the teacher's 0 to 29"),
        ("pruned", {"start.layers": [-1]}, "out of range"),
        ("pruned", {"start.layers": [3, 3]}, "start.layers: [3, 3] must ascend, each layer once"),
        ("pruned", {"start.layers": [3, 1]}, "start.layers: [3, 1] must ascend, each layer once"),
        ("pruned", {"start.hidden_size": 640}, "start.hidden_size: 640 is more than the teacher's 576; lower it"),
        ("pruned", {"start.hidden_size": 500}, "start.hidden_size: 500 is not a multiple of the 9 heads"),
        ("pruned", {"start.heads": 4}, "start.heads: 4 is not a multiple of 3, the queries that share a head"),
        ("pruned", {"start.heads": 12}, "start.heads: 12 is more than the teacher's 9; lower it"),
        ("pruned", {"start.intermediate_size": 2000}, "start.intermediate_size: 2000 is more than the teacher's 1536"),
        ("pruned", {"corpus.tokenizer": "gpt2"}, "corpus.tokenizer: gpt2 is not the teacher's"),
        ("embedding", {"corpus.tokenizer": "gpt2"}, "corpus.tokenizer: gpt2 is not the teacher's"),
        ("embedding", {"model.hidden_size": 640}, "model.hidden_size: 640 is more than the teacher's 576"),
        ("fresh", {"model.hidden_size": 640, "corpus.tokenizer": "gpt2", "start.layers": 31}, ""),
    ],
)
def test_a_start_that_its_teacher_cannot_give_is_refused_before_weights_are_read(
    start: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    params = LAPTOP | {"start": start}
    for key, value in changes.items():
        params = with_value(("scales", "laptop", *key.split(".")), value, params)
    if not said:
        checked_start(load_config(written(tmp_path, params)))
        return
    with pytest.raises(UserError) as caught:
        checked_start(load_config(written(tmp_path, params)))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "scales.laptop." in str(caught.value)


def test_a_teacher_of_another_family_cannot_be_cut(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "gpt_neox"}')
    teacher = ("scales", "laptop", "teacher", "model")
    params = with_value(teacher, str(tmp_path / "teacher"), LAPTOP | {"start": "pruned"})
    with pytest.raises(UserError, match="of architecture 'gpt_neox', and only llama, mistral, qwen2, qwen3, olmo2"):
        checked_start(load_config(written(tmp_path, params)))
    checked_start(load_config(written(tmp_path, params | {"start": "fresh"})))


def test_a_teachers_older_config_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """Neither rope_parameters nor num_key_value_heads: as Llama's own files were published."""
    (tmp_path / "teacher").mkdir()
    old = {"model_type": "llama", "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    old |= {"num_attention_heads": 6, "max_position_embeddings": 64, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(old))
    shape = known_shape(str(tmp_path / "teacher"), 90)
    assert (shape.kv_heads, shape.rope_theta, shape.head_dim, shape.tied) == (6, 5e5, 8, False)
    teacher = ("scales", "laptop", "teacher", "model")
    params = with_value(teacher, str(tmp_path / "teacher"), LAPTOP | {"start": "pruned"})
    with pytest.raises(UserError, match=r"start.layers: 8 is none of the teacher's 0 to 2"):
        checked_start(load_config(written(tmp_path, params)))
