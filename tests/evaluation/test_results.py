"""Results survive the disk, and refuse damage and strange company."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from microlm.errors import UserError
from microlm.evaluation.results import metrics
from microlm.evaluation.results.store import (
    Result,
    model_slug,
    read_result,
    read_results,
    result_path,
    same_protocol,
    standing,
    write_result,
)
from microlm.files import sealed, write_json
from tests.support.toy_results import absent, toy_result


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 200)


@pytest.mark.parametrize("task", ["hellaswag", "stsb", "cb"])
def test_a_result_is_read_as_it_was_written(tmp_path: Path, task: str) -> None:
    result = toy_result(task, "allenai/OLMo-1B-hf", limit=20, shots=5)
    result = dataclasses.replace(result, data={"source": "files", "file": "GLUE/dev.tsv", "rows": 25, "published": 30})
    path = write_result(tmp_path, result)
    assert path == tmp_path / "allenai--OLMo-1B-hf" / f"{task}.{result.identity.protocol}.5shot.20questions.json"
    back = read_result(path)
    assert (back.identity, back.metrics, back.data) == (result.identity, result.metrics, result.data)
    pd.testing.assert_frame_equal(back.table, result.table)
    assert write_result(tmp_path, back).read_bytes() == path.read_bytes()


def test_data_that_was_not_available_is_a_result_and_is_tried_again(tmp_path: Path) -> None:
    path = write_result(tmp_path, absent("snli"))
    assert read_result(path) == absent("snli")
    assert not standing(tmp_path, absent("snli").identity)


def test_figures_outlive_a_day_without_the_data_but_not_other_weights(tmp_path: Path) -> None:
    there = toy_result("rte")
    path = write_result(tmp_path, there)
    write_result(tmp_path, absent("rte"))
    assert read_result(path).metrics == there.metrics
    retrained = dataclasses.replace(absent("rte").identity, model_digest="another")
    write_result(tmp_path, Result(retrained, unavailable="no hub"))
    assert read_result(path).table is None


def test_a_subset_never_replaces_the_full_set(tmp_path: Path) -> None:
    paths = {write_result(tmp_path, toy_result("mrpc", limit=limit)) for limit in (None, 20, 40)}
    assert len(paths) == 3 and len(read_results(tmp_path / "student")) == 3


def test_where_the_rows_were_read_changes_nothing_that_resumption_goes_by(tmp_path: Path) -> None:
    result = toy_result("rte")
    write_result(tmp_path, dataclasses.replace(result, data={"source": "hub"}))
    assert standing(tmp_path, result.identity)


@pytest.mark.parametrize(
    "changed",
    [{"model_digest": "x"}, {"tokenizer": "x"}, {"data_sha256": "x"}, {"questions_sha256": "x"}, {"dtype": "bfloat16"}],
)
def test_only_a_sound_result_of_the_same_thing_stands(tmp_path: Path, changed: dict[str, str]) -> None:
    result = toy_result("rte")
    assert not standing(tmp_path, result.identity)
    path = write_result(tmp_path, result)
    assert standing(tmp_path, result.identity)
    assert not standing(tmp_path, dataclasses.replace(result.identity, **changed))
    path.with_suffix(".parquet").write_bytes(b"")
    assert not standing(tmp_path, result.identity)
    write_result(tmp_path, result)
    assert standing(tmp_path, result.identity)


def resealed(path: Path, old: str, new: str) -> None:
    """Put `new` for `old`, as a program that knows the format would."""
    write_json(path, sealed(json.loads(path.read_text().replace(old, new))))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_text(path.read_text()[:100]), r"0shot\.json is damaged .*microlm evaluate"),
    "noise": (lambda path: path.write_bytes(b"\xff\x00"), r"0shot\.json is damaged .*microlm evaluate"),
    "foreign": (lambda path: path.write_text('{"acc": 1}'), r"0shot\.json is not a result .*move it elsewhere"),
    "list": (lambda path: path.write_text("[1]"), r"0shot\.json is not a result"),
    "identity": (
        lambda path: resealed(path, '"shots": 0', '"shots": "zero"'),
        r"0shot\.json is damaged \(identity\.shots: 'zero' is not a whole number.*microlm evaluate",
    ),
    "metrics": (
        lambda path: resealed(path, '"metrics"', '"numbers"'),
        r"0shot\.json is damaged \(it has no metrics\)",
    ),
    "digit": (
        lambda path: path.write_text(path.read_text().replace('"shots": 0', '"shots": 1')),
        r"0shot\.json: damaged, its sha256 is not that of its content.*microlm evaluate",
    ),
    "absent": (lambda path: path.unlink(), r"0shot\.json is not there; make it with microlm evaluate"),
    "no table": (
        lambda path: path.with_suffix(".parquet").unlink(),
        r"0shot\.parquet is not there, though its \.json is; .*microlm evaluate",
    ),
    "other table": (
        lambda path: path.with_suffix(".parquet").write_bytes(b"PAR1"),
        r"0shot\.parquet is damaged .*microlm evaluate",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line_with_its_mend(tmp_path: Path, damage: str) -> None:
    path = write_result(tmp_path, toy_result("sst2", n=10))
    spoil, message = DAMAGE[damage]
    spoil(path)
    with pytest.raises(UserError, match=message) as error:
        read_result(path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_what_is_not_ours_is_not_overwritten(tmp_path: Path) -> None:
    result = toy_result("sst2", "a/b", n=10)
    path = result_path(tmp_path, result.identity)
    path.parent.mkdir()
    path.write_text('{"precious": true}')
    with pytest.raises(UserError, match=r"not a result of microlm evaluate; move it"):
        write_result(tmp_path, result)
    assert path.read_text() == '{"precious": true}'
    path.unlink()
    write_result(tmp_path, result)
    with pytest.raises(UserError, match=r"holds a result of a/b, not of a--b; name another --out"):
        write_result(tmp_path, toy_result("sst2", "a--b", n=10))
    assert read_result(path).identity.model == "a/b"


@pytest.mark.parametrize("name", ["../..", "/", "a/../b", "models/student/", "", ".hidden", "Ünï code"])
def test_a_model_s_folder_lies_in_the_folder_of_results(tmp_path: Path, name: str) -> None:
    slug = model_slug(name)
    assert slug and "/" not in slug and (tmp_path / slug).resolve().parent == tmp_path.resolve()


def test_a_folder_without_results_or_of_changed_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path)
    old = write_result(tmp_path, toy_result("rte", n=10, limit=8))
    new = write_result(tmp_path, toy_result("sst2", n=10, model_digest="retrained"))
    os.utime(old, (1, 1))
    with pytest.raises(UserError) as error:
        read_results(tmp_path / "student")
    assert str(error.value).startswith(f"{old} is of other weights or another tokenizer than {new}, which is newer; ")
    again = "microlm evaluate student --tasks rte --protocol lm-eval --shots 0 --limit 8"
    assert f"make it again with: {again}; or delete it" in str(error.value)
    for file in (old, old.with_suffix(".parquet")):
        file.unlink()
    assert len(read_results(tmp_path / "student")) == 1


DIFFERENT = {
    "task": ({"task": "rte"}, "task: sst2 against rte"),
    "protocol": ({"protocol": "infill"}, "protocol: lm-eval against infill"),
    "shots": ({"shots": 5}, "number of shots: 0 against 5"),
    "limit": ({"limit": 20}, "number of questions: all against 20"),
    "data": ({"data_sha256": "e" * 64}, "data file: d{12} against e{12}"),
    "wording": ({"questions_sha256": "r" * 64}, "wording of the questions or exemplars: q{12} against r{12}"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_cannot_stand_in_one_column_is_refused(what: str) -> None:
    changed, message = DIFFERENT[what]
    here = toy_result("sst2", "a", n=20)
    there = dataclasses.replace(here, identity=dataclasses.replace(here.identity, model="b", **changed))
    with pytest.raises(UserError, match=rf"^a \(sst2\.lm-eval\.0shot\.json\) and b \(.*differ in {message}; score"):
        same_protocol([here, there])
    same_protocol([here, here, absent("sst2")])


@pytest.mark.parametrize("column", ["item", "label"])
def test_other_questions_are_refused(column: str) -> None:
    here = toy_result("sst2", "a", n=20)
    there = dataclasses.replace(here, table=here.table.assign(**{column: here.table[column][::-1].to_numpy()}))
    with pytest.raises(UserError, match="ids or labels differ"):
        same_protocol([here, there])
