"""Promises of `microlm`: a mistake is one line before any work, and what is on disk is what the table says."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import constants

from microlm import cli
from microlm.evaluation.tasks.task import TASKS
from tests.support.clones import ROOT
from tests.support.tiny_candidates import (
    FIXTURES,
    Said,
    command,
    evaluate,
    finished,
    microlm,
    repository,
    save_tiny_student,
)


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def told(said: Said) -> str:
    """The one line that says what is wrong and how to mend it."""
    assert said.code not in (0, None) and "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), said.err
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("microlm", []),
        ("microlm", ["--help"]),
        ("microlm", ["evaluate", "models/studnet"]),
        ("microlm", ["evaluate", "models/student", "--tasks", "helaswag"]),
        ("microlm", ["compare", "nothing", "nobody"]),
        ("microlm", ["plan", "--gpus", "0"]),
        ("microlm", ["generate", "models/student", "--prompt", "Rome", "--top-k", "0"]),
        ("microlm", ["export", "models/student"]),
        ("stages.check", []),
        ("stages.study", ["--study", "nothing"]),
        ("stages.study", ["--jobs", "0"]),
    ],
)
def test_what_is_said_at_the_door_waits_for_no_torch(module: str, arguments: list[str]) -> None:
    """Neither help nor a refusal needs what takes seconds to import."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = ('torch', 'transformers', 'datasets', 'matplotlib', 'scipy')\n"
        "atexit.register(lambda: print('imported:', *(name for name in heavy if name in sys.modules)))\n"
        f"sys.argv = {[module, *arguments]!r}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "imported:", said.stdout + said.stderr


MISTAKES = [
    (["--tasks", "helaswag"], r"tasks: 'helaswag' is not a task; did you mean hellaswag\?; choose of hellaswag, snli"),
    (["--tasks", "rte,"], r"tasks: '' is not a task; choose of"),
    (["--tasks", "rte,cb,rte"], r"--tasks: rte is named twice"),
    (["--protocol", "lmeval"], r"protocol: 'lmeval' is not a protocol; choose of completion, lm-eval"),
    (["--tasks", "rte", "--protocol", "completion"], r"protocol: rte cannot be asked as completion; choose of lm-eval"),
    (["--tasks", "all", "--protocol", "lm-eval"], r"protocol: snli cannot be asked as lm-eval; choose of question"),
    (["--shots", "-1"], r"--shots: -1 is less than 0"),
    (["--shots", "five"], r"--shots: 'five' is not whole numbers with commas, e\.g\. 0,5"),
    (["--shots", "1.5"], r"--shots: '1\.5' is not whole numbers"),
    (["--shots", ""], r"--shots: '' is not whole numbers"),
    (["--shots", "0,0"], r"--shots: 0 is named twice"),
    (["--shots", "6"], r"shots: 6 asked for, but hellaswag has 5 exemplars under completion; choose 0 to 5"),
    (["--tasks", "rte", "--shots", "0,9"], r"shots: 9 asked for, but rte has 5 exemplars under lm-eval; choose 0 to 5"),
    (["--shots", "5"], r"shots: the 5 exemplars of hellaswag take \d+ tokens, models/student has 256 .*ask for fewer"),
    (["--limit", "0"], r"--limit: 0 is less than 1"),
    (["--limit", "-3"], r"--limit: -3 is less than 1"),
    (["--limit", "many"], r"argument --limit: invalid int value: 'many'; .*--help"),
    (["--batch-tokens", "0"], r"--batch-tokens: 0 is less than 1"),
    (["--data", "nowhere"], r"--data: nowhere is no folder; name"),
    (["--out", "params.yaml"], r"--out: params\.yaml is no folder; name another"),
    (["--dtype", "float8"], r"argument --dtype: invalid choice: 'float8'.*--help"),
    (["--task", "rte", "--frobnicate"], r"--frobnicate.*--help"),
]


@pytest.mark.parametrize(("arguments", "line"), MISTAKES, ids=[" ".join(given) for given, _ in MISTAKES])
def test_a_mistake_is_one_line_and_nothing_is_written(arguments: list[str], line: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert re.search(line, told(microlm("evaluate", "models/student", "--offline", "--out", out, *arguments)))
    assert not out.exists()


def test_alone_it_says_what_can_be_done_and_names_every_command() -> None:
    said = microlm()
    assert said.code in (0, None) and said.err == ""
    lines = [line for line in said.out.splitlines() if line]
    assert len(lines) <= 14 and max(map(len, lines)) <= 120
    (listed,) = (action.choices for action in cli._parser()._actions if action.dest == "command")
    assert set(re.findall(r"microlm ([a-z]+)", said.out)) == set(listed)


@pytest.mark.parametrize("arguments", [["evaluate"], ["compare", "models/student"], ["assess", "models/student"]])
def test_an_unfinished_command_is_one_line(arguments: list[str]) -> None:
    assert "--help says what there is" in told(microlm(*arguments))


UNSCORABLE = [
    ("./models/nothing", r"\./models/nothing: is no model directory; name a folder with config\.json"),
    ("models/studnet", r"models/studnet: is no model directory; did you mean models/student\?"),
    ("data", r"data/config\.json is not there; name a folder with config\.json, model\.safetensors and tokenizer"),
    ("models/student", r"MODEL: models--student is named twice"),
    ("models/student/", r"MODEL: models--student is named twice"),
    ("no-tokenizer", r"no-tokenizer/tokenizer_config\.json: not readable .*make"),
    ("cut", r"cut/model\.safetensors: damaged, .*make it again"),
    ("short", r"shots: the 2 exemplars of rte take \d+ tokens, short has 16 positions; ask for fewer"),
]


@pytest.mark.parametrize(("second", "line"), UNSCORABLE)
def test_a_model_that_cannot_be_scored_is_told_before_the_one_before_it_is_scored(
    second: str, line: str, tmp_path: Path
) -> None:
    if second == "short":
        save_tiny_student(Path(second), context=16)
    elif second in ("no-tokenizer", "cut"):
        shutil.copytree("models/student", second, dirs_exist_ok=True)
        weights = Path(second, "model.safetensors")
        weights.write_bytes(weights.read_bytes()[: 5000 if second == "cut" else None])
        for file in Path(second).glob("token*.json" if second == "no-tokenizer" else "none"):
            file.unlink()
    said = evaluate(f"models/student {second}", tmp_path / "out", "--tasks", "rte", "--shots", "2")
    assert re.search(line, told(said))
    assert not (tmp_path / "out").exists()


def spoil_labels(path: Path) -> None:
    path.write_text(re.sub(r"(?m)\t[01]$", "\t-1", path.read_text()))


def spoil_columns(path: Path) -> None:
    path.write_text(path.read_text().replace("question1", "q1"))


def spoil_hash(path: Path) -> None:
    path.with_name("SHA256SUMS").write_text(f"{hashlib.sha256(b'').hexdigest()}  {path.name}\n")


SPOILED = {
    spoil_labels: r"QQP/dev\.tsv: row 1: the label is -1.*give the validation split of qqp",
    spoil_columns: r"QQP/dev\.tsv: row 1: no column 'question1'.*as it is published",
    spoil_hash: r"QQP/dev\.tsv: its sha256 is not the one in .*SHA256SUMS; fetch the file again",
    lambda path: path.write_bytes(path.read_bytes()[:-20]): r"QQP/dev\.tsv: line \d: \d columns, not 6; replace it",
    lambda path: path.write_bytes(b"\xff\xfe" * 50): r"QQP/dev\.tsv: .*replace it",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_task_file_stops_the_run_before_any_task_is_scored(spoil, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "QQP", tmp_path / "data" / "QQP")
    spoil(tmp_path / "data" / "QQP" / "dev.tsv")
    said = evaluate("models/student", tmp_path / "out", "--data", tmp_path / "data", "--tasks", "cb,qqp")
    assert re.search(SPOILED[spoil], told(said))
    assert not (tmp_path / "out").exists()


def test_what_lies_where_a_result_would_go_is_kept_and_told_before_scoring(tmp_path: Path) -> None:
    path = tmp_path / "models--student" / "rte.lm-eval.0shot.json"
    path.parent.mkdir()
    path.write_text('{"precious": true}')
    said = evaluate("models/student", tmp_path, "--tasks", "cb,rte")
    assert re.search(r"rte\.lm-eval\.0shot\.json is there and is not a result.*move it", told(said))
    assert path.read_text() == '{"precious": true}' and list(path.parent.iterdir()) == [path]


def test_the_table_says_what_json_and_parquet_hold(tmp_path: Path) -> None:
    asked = ("--tasks", "rte,mrpc,cola,stsb", "--limit", "30", "--table", "markdown")
    said = evaluate("models/student models/llama", tmp_path, *asked)
    assert said.code == 0 and "Traceback" not in said.err
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.out.splitlines() if "|" in line]
    table = {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[2:]}
    for model in ("models/student", "models/llama"):
        found = sorted((tmp_path / model.replace("/", "--")).glob("*.json"))
        assert len(found) == 4
        for path in found:
            content, rows = json.loads(path.read_text()), pd.read_parquet(path.with_suffix(".parquet"))
            metrics, task = content["metrics"], content["identity"]["task"]
            assert content["identity"]["model"] == model and metrics["items"] == len(rows)
            ours = [heading for heading in table[model] if "<br>published<br>" not in heading]
            for metric in TASKS[task].metrics:
                (heading,) = [heading for heading in ours if heading.startswith(f"{task}<br>{metric}<br>")]
                shown = f"{100 * metrics[metric]:.2f} ± {100 * metrics[f'{metric}_se']:.2f}"
                assert table[model][heading] == shown and heading.split("<br>")[2] == metrics["protocol"]
            if "acc" in metrics:
                assert metrics["acc"] == pytest.approx((rows["prediction_sum"] == rows["label"]).mean(), abs=1e-6)
    assert "stsb: gold scores from 0 to 5" in said.out
    assert "f1" not in evaluate("models/student", tmp_path, *asked, "--metrics", "primary").out


def test_a_trailing_slash_is_the_same_model(tmp_path: Path) -> None:
    first = evaluate("models/student", tmp_path, "--tasks", "cb", "--limit", "8")
    again = evaluate("./models/student/", tmp_path, "--tasks", "cb", "--limit", "8")
    assert first.code == again.code == 0 and first.out.splitlines()[-8:] == again.out.splitlines()[-8:]
    assert "cb (lm-eval): was there already" in again.err and "was there" not in first.err


@pytest.fixture(scope="module")
def scored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored")
    assert evaluate("models/student", out, "--tasks", "rte,cb", "--limit", "30").code == 0
    return out


def test_a_model_does_not_differ_from_itself(scored: Path) -> None:
    said = microlm("compare", "models/student", "models/student/", "--out", scored)
    assert said.code == 0 and "no difference in acc is shown" in said.out
    (path,) = scored.glob("*-minus-*.json")
    for row in json.loads(path.read_text())["tasks"]:
        assert row["p"] == row["p_holm"] == row["mcnemar_p"] == 1 and row["discordance"] == 0
        assert all((m["difference"], m["low"], m["high"], m["p"]) == (0, 0, 0, 1) for m in row["metrics"].values())


@pytest.mark.parametrize(
    ("arguments", "differ"),
    [
        (["--tasks", "cb", "--protocol", "infill", "--limit", "30"], "protocol: lm-eval against infill"),
        (["--tasks", "cb", "--shots", "1", "--limit", "30"], "number of shots: 0 against 1"),
        (["--tasks", "cb", "--limit", "12"], "number of questions: 30 against 12"),
        (["--tasks", "snli"], "no scored task in common"),
    ],
)
def test_what_was_asked_otherwise_is_not_compared(
    scored: Path, tmp_path: Path, arguments: list[str], differ: str
) -> None:
    assert evaluate("models/second", tmp_path, *arguments).code == 0
    one, other = scored / "models--student", tmp_path / "models--second"
    assert differ in told(microlm("compare", one, other, "--out", tmp_path))
    assert not list(tmp_path.glob("*.json"))


def test_a_model_without_results_is_told_how_to_get_them(scored: Path) -> None:
    line = told(microlm("compare", "models/student", "models/second", "--out", scored))
    assert line.startswith("models/second: no results in ") and line.endswith("microlm evaluate models/second")


def test_what_only_the_hub_has_is_named_when_it_cannot_be_reached(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--tasks", "cb", "--offline", "--out", tmp_path / "out")
    unknown = command("evaluate", "models/student", "nobody/such-a-model", *asked, HF_HOME=str(tmp_path))
    line = told(finished(unknown))
    assert "nobody/such-a-model is not a folder here, and the hub did not give it" in line and "connect" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = microlm("references", *asked)
    *missing, last = said.err.strip().splitlines()
    listed = re.findall(r"(?m)^- \{model: (\S+),", (folder / "params.yaml").read_text())
    assert said.code == 1 and len(missing) == len(listed) > 1
    assert all(line.startswith("not measured: ") and name in line for name, line in zip(listed, missing, strict=True))
    assert last == "error: params.yaml: references: the weights of none could be had; connect and try again"
    assert not (tmp_path / "out").exists()
