"""A model card says what the metrics say, in the hub's format, of the weights that lie beside it; or it is refused."""

import copy
import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.config import Config, load_config
from microlm.errors import UserError
from microlm.evaluation.results.store import write_result
from microlm.files import read_json, read_yaml, sha256_bytes, write_json
from microlm.report.card_text import code
from microlm.report.licences import corpus_works, teacher_work
from microlm.report.model_card import Asked, card_of, model_card, refuse_unrun, stale_cards, write_cards
from microlm.report.provenance import Origin, origin
from microlm.report.summary_table import amount
from microlm.runtime.paths import CARD, TRAINED_MODELS
from stages import compare
from tests.support.clones import ROOT
from tests.support.toy_results import toy_result
from tests.support.workspace import inside

ARMS = tuple(TRAINED_MODELS)
WEIGHTS = {name: str(number) * 64 for number, name in enumerate(ARMS)}
SHAPE = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 15, "hidden_size": 576}
# numbers that are no figures: names, years, licences, and the words of the tables
NO_FIGURES = (
    r"`[^`]*`|```.*?```|Allal et al\. 2025|CC BY-SA [34]\.0|Apache-2\.0|10,033 leads|4 bits|95 %|100 x|covers 0|"
    r"0 for guessing and 1 for all|ODC-By 1\.0|Penedo et al\. 2024|\(1 - alpha\)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The committed run as `compare` finds it; of weights there are the hashes, of scores those that name them."""
    top = tmp_path_factory.mktemp("run")
    shutil.copytree(ROOT / "metrics", top / "metrics")
    shutil.copy(ROOT / "params.yaml", top)
    with inside(top):
        for name, digest in WEIGHTS.items():
            folder = Path("models", name)
            folder.mkdir(parents=True)
            write_json(folder / "config.json", SHAPE | {"max_position_embeddings": 8192})
            (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
            (folder / "model.safetensors").touch()
            write_result(Path("data/evaluation"), toy_result("copa", name, 8, model_digest=digest))
        Path("data/shards").mkdir()
        write_json(Path("data/shards/manifest.json"), {"source": {"source": "packaged"}})
        yield top


@pytest.fixture(autouse=True)
def _as_it_was(run: Path) -> Iterator[None]:
    yield
    for card in run.glob(f"models/*/{CARD}"):
        card.unlink()


@cache
def config() -> Config:
    return load_config(ROOT / "params.yaml")


def asked(**changes: Any) -> Asked:
    changed = replace(config(), **changes)
    top = {key: getattr(changed, key) for key in compare.TOP} | {"start": changed.start_kind}
    return Asked(top, changed.at, changed.distills)


def summary() -> dict[str, Any]:
    return read_json("metrics/summary.json", "compare")


def card(name: str, found: dict[str, Any] | None = None, **changes: Any) -> str:
    return model_card(name, found or summary(), asked(**changes), Origin())


def numbers(value: Any) -> Iterator[float]:
    """All that metrics or parameters hold."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def known(found: dict[str, Any]) -> set[str]:
    """Every figure as a card may round it."""
    files = [json.loads(path.read_text()) for path in Path("metrics").glob("*.json") if path.stem != "summary"]
    values = {*numbers([found, files, list(asked().top.values()), SHAPE]), 8192}
    values.add(sum(found["student"][key] for key in ("tokens_before", "tokens")))
    written = {f"{value:.4f}" for value in values} | {f"{100 * value:.1f}" for value in values}
    written |= {f"{value:g}" for value in values} | {f"{value:,}" for value in values if value == int(value)}
    return written | {amount(value).rstrip("kMB") for value in values if value > 0}


def figures(text: str) -> list[str]:
    plain = re.sub(NO_FIGURES, " ", text, flags=re.DOTALL)
    return re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", plain)


def with_other_figures(seed: int) -> dict[str, Any]:
    """The committed summary with any figures in place of its own."""
    found, random = copy.deepcopy(summary()), Random(seed)

    def change(block: dict[str, Any]) -> None:
        for key, value in block.items():
            if isinstance(value, float):
                block[key] = round(random.uniform(0, 1), 6)
            elif isinstance(value, dict):
                change(value)

    for block in (*found.values(), *found["benchmarks"]):
        if isinstance(block, dict):
            change(block)
    return found


@settings(max_examples=12)
@given(st.sampled_from(ARMS), st.integers(0, 2**32))
def test_every_figure_of_a_card_is_one_of_the_metrics(run: Path, name: str, seed: int) -> None:
    found = with_other_figures(seed)
    text = card(name, found)
    told = figures(ModelCard(text).text)
    assert len(told) > 50 and set(told) - known(found) == set()
    for result in ModelCard(text).data.eval_results:
        assert result.metric_value in set(numbers(found[name])) | set(numbers(found["benchmarks"]))


@pytest.mark.parametrize("name", ARMS)
def test_a_card_is_in_the_hubs_format_and_names_the_weights(run: Path, name: str) -> None:
    write_cards(summary(), asked(), Origin())
    path = Path("models", name, CARD)
    data, text = metadata_load(path), path.read_text()
    assert ModelCard(text).data.to_dict() == data  # as the hub reads it
    assert data["weights_sha256"] == WEIGHTS[name] and data["license"] == "apache-2.0" and data["language"] == "en"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (index,) = data["model-index"]
    scored = [row for row in summary()["benchmarks"] if name in row]
    assert len(index["results"]) == len(scored) + 2
    for row in scored:
        (shown,) = [of for of in index["results"] if of["dataset"]["name"] == row["task"]]
        (metric,) = shown["metrics"]
        assert metric["value"] == row[name]["value"] and f"{row['protocol']} protocol" in metric["name"]
    assert ("distillation" in data["tags"]) == (name == "student")
    for said in ("CC BY-SA 4.0", "CC BY-SA 3.0", "Apache-2.0", "AutoModelForCausalLM", WEIGHTS[name], "dvc repro"):
        assert said in text
    assert card_of(path.parent) == text and stale_cards(summary()) == []


def test_a_card_of_other_weights_or_other_scores_is_found(run: Path) -> None:
    found = summary()
    assert [line.split(" ")[0] for line in stale_cards(found)] == [f"models/{name}" for name in ARMS]  # has no card yet
    write_cards(found, asked(), Origin())
    sums = Path("models/student/SHA256SUMS")
    before = sums.read_text()
    sums.write_text(before.replace("2" * 64, "f" * 64))
    try:
        with pytest.raises(UserError, match=r"models/student/README\.md: is of other weights .*compare --cards"):
            card_of(Path("models/student"))
        (line,) = stale_cards(found)
        assert line.startswith("models/student/README.md: is of other weights")
        kept = Path("models/control", CARD).read_text()
        with pytest.raises(UserError, match=r"models/student: its weights are not those .*dvc repro evaluate@student"):
            write_cards(found | {"windows": 7}, asked(), Origin())
        assert Path("models/control", CARD).read_text() == kept  # nothing is written where one cannot be made
    finally:
        sums.write_text(before)
    (*lines,) = stale_cards(found | {"windows": 7})
    assert [line.split(":")[0] for line in lines] == [f"models/{name}/README.md" for name in ARMS]
    assert all("has other figures than metrics/summary.json" in line for line in lines)


def test_a_card_tells_no_parameter_that_was_not_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = read_yaml(ROOT / "params.yaml", "", "")
    stages = read_yaml(ROOT / "dvc.yaml", "", "")["stages"]

    def ran(stage: str) -> dict[str, Any]:
        keys = (key.replace("${scale}", "laptop") for key in stages[stage]["params"])
        return {key: functools.reduce(lambda block, part: block[part], key.split("."), params) for key in keys}

    lock = {"stages": {stage: {"params": {"params.yaml": ran(stage)}} for stage in TRAINED_MODELS.values()}}
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    refuse_unrun("laptop")  # no run of DVC's to hold it against
    Path("dvc.lock").write_text(json.dumps(lock))
    refuse_unrun("laptop")
    for old, new, key in (("alpha: 0.5", "alpha: 0.2", "alpha"), ("  context: 1024", "  context: 512", None)):
        text = (ROOT / "params.yaml").read_text()
        assert old in text
        Path("params.yaml").write_text(text.replace(old, new, 1))
        if key is None:  # of no training's parameters: a pruned start's model has its teacher's
            refuse_unrun("laptop")
        else:
            with pytest.raises(UserError, match=rf"params\.yaml: {key} is not what models/student was trained with"):
                refuse_unrun("laptop")
    with pytest.raises(UserError, match=r"scales\.smoke\.\w+ is not what models/control was trained with"):
        refuse_unrun("smoke")


def test_a_card_that_somebody_else_wrote_is_not_taken_for_one_of_these_weights(run: Path) -> None:
    folder = Path("models/student")
    assert card_of(folder) is None
    for text in ("# a model", "---\nlicense: mit\n---\n", "---\n[\n---\n"):
        (folder / CARD).write_text(text)
        with pytest.raises(UserError, match=r"models/student/README\.md: .*compare --cards"):
            card_of(folder)


def test_weights_without_sums_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / CARD).write_text(f"---\nweights_sha256: {'0' * 64}\n---\n")
    with pytest.raises(UserError, match="other weights"):
        card_of(tmp_path)
    (tmp_path / CARD).write_text(f"---\nweights_sha256: {sha256_bytes(b'weights')}\n---\n")
    assert card_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "teacher", "distills", "licence", "base"),
    [
        ("student", "fresh", "gemma3-270m", True, "gemma", None),
        ("student", "fresh", "gemma3-270m", False, "apache-2.0", None),
        ("continued", "fresh", "gemma3-270m", True, "apache-2.0", None),
        ("control", "pruned", "somebody/their-model", True, "other", "somebody/their-model"),
        ("student", "fresh", "somebody/their-model", True, "other", None),
    ],
)
def test_the_licence_is_that_of_what_is_in_the_weights(
    run: Path, name: str, kind: str, teacher: str, distills: bool, licence: str, base: str | None
) -> None:
    at = config().at
    at = replace(at, teacher=replace(at.teacher, model=teacher))
    metrics = Path("metrics/start.json")
    before = metrics.read_text()
    write_json(metrics, read_json(metrics, "start") | {"start": kind})
    try:
        data = ModelCard(card(name, at=at, alpha=0.5 if distills else 0.0)).data
    finally:
        metrics.write_text(before)
    assert data.license == licence and data.base_model == base
    assert data.license_name == ("not-known-here" if licence == "other" else None)


def test_nothing_is_claimed_of_text_that_a_person_brings(run: Path) -> None:
    manifest = Path("data/shards/manifest.json")
    before = manifest.read_text()
    hub = {"source": "hub", "dataset": "someone/texts", "subset": None, "revision": "0123abcd"}
    files = {"source": "files", "files": {f"/home/me/{n}`|\n.txt": "0" for n in range(9)}}
    try:
        for source, datasets in ((hub, ["someone/texts"]), (files, None)):
            write_json(manifest, {"source": source})
            found = ModelCard(card("control"))
            assert (found.data.license, found.data.language, found.data.datasets) == ("other", None, datasets)
            assert "licence not known here" in found.text and "CC BY-SA" not in found.text
            assert "/home/me" not in found.text
    finally:
        manifest.write_text(before)


@given(st.text())
def test_others_words_stay_one_code_span(text: str) -> None:
    shown = code(text)
    assert shown[0] == shown[-1] == "`" and "`" not in shown[1:-1] and len(shown.splitlines()) == 1


def test_a_teacher_in_a_folder_is_told_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "my-teacher").mkdir()
    assert teacher_work(str(tmp_path / "my-teacher")).name == "my-teacher"
    assert teacher_work("packaged").licence == "apache-2.0" and teacher_work("a/b").hub == "a/b"
    assert corpus_works({"source": "hub", "dataset": "HuggingFaceFW/fineweb-edu", "revision": "8"})[0].said.startswith(
        "ODC"
    )


def test_the_command_is_what_differs_from_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@e", *arguments], cwd=tmp_path, check=True)

    params = tmp_path / "params.yaml"
    params.write_text("alpha: 0.5\nscales:\n  a: {rate: 0.001, paths: [x]}\n  b: {rate: 1}\n")
    with inside(tmp_path):
        assert origin("a") == Origin() and origin("a").command == "dvc repro"
        git("init", "--quiet")
        git("add", "params.yaml")
        git("commit", "--quiet", "-m", "a run")
        assert origin("a").overrides == () and re.fullmatch("[0-9a-f]{40}", origin("a").commit)
        params.write_text(
            "# DVC's own layout\nalpha: 0.2\nscales:\n  a:\n    rate: 1e-3\n    paths: [x, it's]\n  b: {rate: 2}\n"
        )
        assert origin("a").command == "dvc exp run -S alpha=0.2 -S 'scales.a.paths=[x,'\"'\"'it\\'\"'\"'s'\"'\"']'"
        assert not origin("a").edited
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "new.py").touch()
        assert origin("a").edited
