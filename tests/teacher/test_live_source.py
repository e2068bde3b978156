"""`teacher.source: live` through the real stages: no cache, and the student that it would have given, bit for bit."""

from pathlib import Path

import pytest

from microlm.files import read_json
from tests.support.other_tokenizers import first_merges, write_teacher
from tests.support.tiny_run import (
    COMPARE,
    DISTILL,
    EVALUATIONS,
    LABEL,
    SELECT,
    WHEELS,
    changed,
    complaints,
    contents,
    finish,
    remove_outputs,
    run,
)
from tests.support.tiny_teacher import gpt2

# a window at a time: the teacher is asked in the same batches, whoever asks
ONE_WINDOW = {"batch__micro_batch_rows": "1", "teacher__batch_rows": "1", "on_policy__prompts": "1"}


def student_of(directory: Path) -> dict[str, str]:
    for stage in (LABEL, DISTILL):
        remove_outputs(stage, directory)
        finish(stage, directory)
    return contents(directory, DISTILL.outputs)


@pytest.mark.parametrize("record", ["full", "compact"])
@pytest.mark.parametrize("foreign", [False, True], ids=["same tokenizer", "projected"])
def test_live_student_is_the_cached_one_bit_for_bit(record: str, foreign: bool, whole: Path, tmp_path: Path) -> None:
    values = ONE_WINDOW | {"teacher__record": record}
    if foreign:
        write_teacher(tmp_path / "foreign", "llama", first_merges(gpt2(WHEELS), 2000), padding=31)
        values |= {"teacher__model": str(tmp_path / "foreign")}
    cached = student_of(changed(whole, tmp_path / "cached", teacher__source="cache", **values))
    directory = changed(whole, tmp_path / "live", teacher__source="live", **values)
    assert student_of(directory) == cached
    assert {path.name for path in (directory / "data/teacher").iterdir()} == {"manifest.json", "table.bin"}
    metrics = read_json(directory / "metrics/teacher.json", "teacher")
    assert metrics["source"] == "live" and not {"bytes_per_token", "head_mass", "train"} & metrics.keys()
    assert metrics["val"] == read_json(tmp_path / "cached/metrics/teacher.json", "teacher")["val"]


def test_compact_records_train_the_full_ones_student_within_a_thousandth_of_a_bit(whole: Path, tmp_path: Path) -> None:
    found = {}
    for record in ("full", "compact"):
        directory = changed(whole, tmp_path / record, teacher__record=record)
        student_of(directory)
        found[record] = read_json(directory / "metrics/student.json", "distill")["val_bpb"]
    assert found["compact"] != found["full"]
    assert found["compact"] == pytest.approx(found["full"], abs=1e-3)


def test_report_of_a_live_run_says_so(whole: Path, tmp_path: Path) -> None:
    directory = changed(whole, tmp_path / "live", teacher__source="live")
    for stage in (LABEL, SELECT, DISTILL, *EVALUATIONS, COMPARE):
        remove_outputs(stage, directory)
        finish(stage, directory)
    summary = read_json(directory / "metrics/summary.json", "compare")
    assert summary["teacher"]["source"] == "live"


def test_a_cache_is_not_read_as_a_live_teachers_nor_the_other_way(whole: Path, tmp_path: Path) -> None:
    for source, other in (("live", "cache"), ("cache", "live")):
        directory = changed(whole, tmp_path / source, teacher__source=source)
        remove_outputs(LABEL, directory)
        finish(LABEL, directory)
        params = directory / "params.yaml"
        params.write_text(
            params.read_text().replace(f"source: {source}\n      record", f"source: {other}\n      record")
        )
        before = contents(directory, DISTILL.outputs)
        status, said = run(DISTILL, directory)
        assert status == 1
        assert len(complaints(said)) == 1 and "source" in said and "dvc repro" in said
        assert contents(directory, DISTILL.outputs) == before


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"teacher__source": "live", "continuation__windows": "difference"},
            "continuation.windows: difference ranks windows by the teacher's",
        ),
        ({"teacher__source": "both"}, "source: 'both'"),
        ({"teacher__record": "tiny"}, "record: 'tiny'"),
        ({"teacher__top_k": "100000"}, "top_k"),
    ],
)
def test_what_a_stage_cannot_serve_is_one_line(values: dict[str, str], told: str, whole: Path, tmp_path: Path) -> None:
    directory = changed(whole, tmp_path / "wrong", **values)
    before = contents(directory, LABEL.outputs)
    status, said = run(LABEL, directory)
    assert status == 1 and len(complaints(said)) == 1 and told in said
    assert contents(directory, LABEL.outputs) == before
