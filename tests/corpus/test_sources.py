"""Promises of the sources: every document once, in a fixed order, and a clear word where there is none."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microlm.corpus.sources import describe, documents
from microlm.errors import UserError
from microlm.parameters import CorpusConfig
from tests.support.clones import FIXTURES

FIXTURE = FIXTURES / "documents.jsonl"
TEXTS = ["First document.", "Second,\nof two lines.", "Third: naïve café 日本."]


def config(**changes: Any) -> CorpusConfig:
    defaults = {
        "source": "files",
        "tokenizer": "gpt2",
        "validation_fraction": 0.1,
        "train_tokens": None,
        "shard_tokens": 1024,
    }
    return CorpusConfig(**(defaults | changes))


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json_list(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[Any]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "json": write_json_list, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_document_of_a_file_comes_in_order(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"a.{kind}", [{"body": text, "id": i} for i, text in enumerate(TEXTS)])
    assert list(documents(config(paths=[str(tmp_path / f"*.{kind}")], text_column="body"))) == TEXTS


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    assert list(documents(config(paths=[str(tmp_path / "*.txt")], text_column="body"))) == TEXTS


def test_globs_may_overlap_and_kinds_may_mix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "2.jsonl", [{"text": TEXTS[1]}])
    write_parquet(tmp_path / "1.parquet", [{"text": TEXTS[0]}])
    (tmp_path / "b" / "3.txt").write_text(TEXTS[2], encoding="utf-8")
    paths = [str(tmp_path / "**" / "*.*"), str(tmp_path / "b" / "2.jsonl")]
    assert list(documents(config(paths=paths))) == TEXTS


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"txt": "x", "id": 1}], r"a\.jsonl: has no column 'text', only txt, id; set corpus.text_column"),
        ([{"text": "x"}, {"text": ""}], r"a\.jsonl: row 2: the document has no text"),
        ([{"text": "x"}, {"text": " \n\t"}], r"a\.jsonl: row 2: the document has no text"),
        ([{"text": "x"}, {"text": None}], r"a\.jsonl: row 2: 'text' holds NoneType, not text"),
        ([{"text": 5}], r"a\.jsonl: row 1: 'text' holds int, not text"),
        ([], r"a\.jsonl: empty; mend the file"),
    ],
)
def test_a_document_without_text_is_named_by_file_and_row(tmp_path: Path, rows: list[Any], complaint: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=complaint) as caught:
        list(documents(config(paths=[str(tmp_path / "a.jsonl")])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "cut o\xff')
    with pytest.raises(UserError, match=f"{name}: not readable as") as caught:
        list(documents(config(paths=[str(tmp_path / name)])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda folder: None, r"no file matches .*nothing\*"),
        (lambda folder: (folder / "nothing.docx").write_text("x"), r"nothing\.docx: cannot be read as text"),
        (
            lambda folder: (folder / "nothing.txt").write_text(" "),
            r"nothing\.txt: row 1: the document has no text|holds no document",
        ),
    ],
)
def test_files_that_give_no_text_are_an_error(tmp_path: Path, prepare: Callable[[Path], None], complaint: str) -> None:
    prepare(tmp_path)
    with pytest.raises(UserError, match=complaint):
        list(documents(config(paths=[str(tmp_path / "nothing*")])))


def fineweb_edu_row() -> dict[str, Any]:
    """What FineWeb-Edu says of a document beside its text."""
    return {
        "id": "<urn:uuid:0>",
        "dump": "CC-MAIN-2024-10",
        "url": "http://example.org/",
        "file_path": "s3://commoncrawl/crawl-data/x.warc.gz",
        "language": "en",
        "language_score": 0.97,
        "token_count": 10,
        "score": 3.2,
        "int_score": 3,
    }


def fineweb_edu(folder: Path, texts: list[str]) -> Path:
    """A dataset folder with FineWeb-Edu's layout and schema."""
    files = {
        "sample/10BT/000_00000": texts[:2],
        "sample/10BT/001_00000": texts[2:],
        "data/CC-MAIN-2024-10/000_00000": ["Not sampled."],
    }
    for name, half in files.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [{"text": text, **fineweb_edu_row()} for text in half])
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*/*\n"
    card += "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    (folder / "README.md").write_text(card)
    return folder


def test_a_hub_dataset_is_streamed_by_subset(tmp_path: Path) -> None:
    dataset = fineweb_edu(tmp_path / "fineweb-edu", TEXTS)
    hub = config(source="hub", dataset=str(dataset), subset="sample-10BT", revision="0" * 40)
    assert list(documents(hub)) == TEXTS
    assert describe(hub) == {"source": "hub", "dataset": str(dataset), "subset": "sample-10BT", "revision": "0" * 40}


def test_a_hub_dataset_without_the_column_or_subset_is_an_error(tmp_path: Path) -> None:
    dataset = str(fineweb_edu(tmp_path / "fineweb-edu", TEXTS))
    with pytest.raises(UserError, match="has no column 'content', only text, id"):
        list(
            documents(config(source="hub", dataset=dataset, subset="sample-10BT", revision="x", text_column="content"))
        )
    with pytest.raises(UserError, match="not readable from the hub"):
        list(documents(config(source="hub", dataset=dataset, subset="sample-99BT", revision="x")))


def test_an_unreachable_hub_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"check corpus\.dataset, subset and revision and the network") as caught:
        list(documents(config(source="hub", dataset=str(tmp_path / "no" / "dataset"), revision="x")))
    assert "\n" not in str(caught.value)


def test_the_packaged_corpus_is_whole_mixed_and_in_a_fixed_order(parts: Path) -> None:
    packaged = config(source="packaged")
    texts = list(documents(packaged, parts))
    assert len(texts) == 10_033 + 2_938
    assert texts == list(documents(packaged, parts))
    articles = sum(1 for text in texts[:1000] if "\n" in text)
    assert 650 < articles < 900  # 77 % of all: both kinds from the start
    assert all(isinstance(digest, str) and len(digest) == 64 for digest in describe(packaged, parts)["files"].values())


def test_the_fixture_holds_short_varied_documents() -> None:
    texts = list(documents(config(paths=[str(FIXTURE)])))
    assert len(texts) == len(set(texts)) >= 100
    assert describe(config(paths=[str(FIXTURE)]))["files"].keys() == {str(FIXTURE)}


def test_compressed_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read as text"):
        list(documents(config(paths=[str(tmp_path / "*.gz")])))
