"""Promises of the sources: every document once, in a fixed order, and a clear word where there is none."""

import codecs
import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.corpus import sources, text_column
from microlm.corpus.sources import SPARED_ROWS, SPARED_SHARE, batches, describe, documents
from microlm.errors import UserError
from microlm.parameters import CorpusConfig
from tests.support.clones import FIXTURES, ROOT

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
    with open(path, "wb") as file:  # by any name
        pq.write_table(pa.Table.from_pylist(rows), file)


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


# --- what else a file holds, and what it is called --------------------------------------------------------------------


def test_a_column_that_changes_its_type_late_is_not_looked_at(tmp_path: Path) -> None:
    """A reader that types every column from the first megabytes ends here."""
    rows = [{"text": "x" * 2**20, "note": None}] * 12 + [{"text": "the last one", "note": "x"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert [len(text) for text in documents(config(paths=[str(tmp_path / "a.jsonl")]))] == [2**20] * 12 + [12]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@given(
    rows=st.lists(st.tuples(WORDS, st.dictionaries(st.sampled_from("abc"), JSON)), min_size=1, max_size=6),
    kind=st.sampled_from(["jsonl", "json"]),
    mark=st.sampled_from([b"", codecs.BOM_UTF8]),
    blank=st.sampled_from(["", "\n", " \n\t\n"]),
)
def test_other_columns_of_json_may_hold_anything(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, dict]], kind: str, mark: bytes, blank: str
) -> None:
    path = tmp_path_factory.mktemp("json") / f"a.{kind}"
    objects = [other | {"text": text} for text, other in rows]
    lines = json.dumps(objects) if kind == "json" else f"\n{blank}".join(map(json.dumps, objects))
    path.write_bytes(mark + blank.encode() + lines.encode() + blank.encode())
    assert list(documents(config(paths=[str(path)]))) == [text for text, _ in rows]


def test_a_number_that_python_refuses_to_read_is_no_text_and_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": 1%s}\n' % ("0" * 5000))
    assert list(documents(config(paths=[str(tmp_path / "a.jsonl")]))) == ["x"]


OTHERS = {
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
    "struct": pa.array([{"text": 1}, None, {"text": 2}]),
    "decimal": pa.array([1, None, 3], pa.decimal256(50)),
    "duration": pa.array([1, None, 3], pa.duration("ns")),
    "bytes": pa.array([b"\xff", None, b""], pa.large_binary()),
    "lists": pa.array([[[1.5]], None, []], pa.list_(pa.list_(pa.float16()))),
    "category": pa.array(["a", None, "b"]).dictionary_encode(),
    "text.more": pa.array([1, 2, 3]),
}


@pytest.mark.parametrize("type_of_text", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_other_columns_of_parquet_may_be_of_any_type(tmp_path: Path, type_of_text: pa.DataType) -> None:
    table = pa.table({**OTHERS, "text": pa.array(TEXTS).cast(type_of_text)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert list(documents(config(paths=[str(tmp_path / "a.parquet")]))) == TEXTS


NAMES = st.binary(min_size=1, max_size=60).filter(lambda name: not {0, ord("/")} & set(name)).map(os.fsdecode)
TYPED = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40)


@given(
    folder=(NAMES | TYPED | st.sampled_from(["corpus [v2]", "https:", "hf:", "a*b", "**", "?", "~", "$HOME"])).filter(
        lambda name: name not in (".", "..")
    ),
    name=NAMES | TYPED | st.sampled_from(["part [1]", "[!a]", "a:b", "*", "::", " ", "zip:", "#%20"]),
    kind=st.sampled_from(list(WRITERS)),
)
def test_any_name_that_the_file_system_allows_is_the_file_itself(
    tmp_path_factory: pytest.TempPathFactory, folder: str, name: str, kind: str
) -> None:
    path = tmp_path_factory.mktemp("names") / folder / f"x{name}.{kind}"
    path.parent.mkdir()
    WRITERS[kind](path, [{"text": text} for text in TEXTS])
    for pattern in (path, path.parent / f"x*.{kind}"):
        assert list(documents(config(paths=[str(pattern)]))) == TEXTS
        assert list(describe(config(paths=[str(pattern)]))["files"]) == [str(path)]


def test_a_name_that_is_there_is_no_glob(tmp_path: Path) -> None:
    for number, name in enumerate(("part [1].jsonl", "part 1.jsonl")):
        write_jsonl(tmp_path / name, [{"text": TEXTS[number]}])
    assert list(documents(config(paths=[str(tmp_path / "part [1].jsonl")]))) == TEXTS[:1]
    assert list(documents(config(paths=[str(tmp_path / "part [12].jsonl")]))) == TEXTS[1:2]
    assert list(documents(config(paths=[str(tmp_path / "*.jsonl")]))) == [TEXTS[1], TEXTS[0]]


# --- rows without text ------------------------------------------------------------------------------------------------


@given(
    kinds=st.lists(st.sampled_from(["text", "", " \n", None]), max_size=40), source=st.sampled_from(["json", "parquet"])
)
def test_rows_without_text_are_counted_and_left_out_where_that_is_asked(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str | None], source: str
) -> None:
    path = tmp_path_factory.mktemp("empty") / f"a.{source}"
    rows = [{"text": f"{text} {number}" if text == "text" else text} for number, text in enumerate([*kinds, "text"])]
    WRITERS[source](path, rows)
    wanted = [row["text"] for row in rows if row["text"] and row["text"].strip()]
    empty = len(rows) - len(wanted)
    found = batches(config(paths=[str(path)], empty="skip"))
    if empty > SPARED_ROWS + SPARED_SHARE * len(rows):
        with pytest.raises(UserError, match=rf"a\.{source}: row {len(rows)}: {empty} of the {len(rows)} rows"):
            list(found)
        return
    read = list(found)
    assert [text for batch in read for text in batch.texts] == wanted
    assert (read[-1].after.documents, read[-1].after.empty) == (len(wanted), empty)
    if empty:
        with pytest.raises(UserError, match=r"a\.\w+: row \d+: "):
            list(batches(config(paths=[str(path)])))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@given(st.data())
def test_a_corpus_that_is_read_on_is_that_of_one_reading(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("resumed")
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    for number, size in enumerate(sizes):
        rows = [{"text": f"{number}.{row}" if (row + 1) % 4 else ""} for row in range(size)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{number}.{kind}", row_group_size=3)
        else:
            WRITERS[kind](folder / f"{number}.{kind}", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_column, "BATCH_ROWS", 2)
        whole = list(batches(wanted := config(paths=[str(folder / "*")], empty="skip")))
        for cut, batch in enumerate(whole, start=1):
            assert list(batches(wanted, start=batch.after)) == whole[cut:]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"txt": "x", "id": 1}], r"a\.jsonl: has no column 'text', only txt, id; set corpus.text_column"),
        ([{"text": "x"}, {"text": ""}], r"a\.jsonl: row 2: the document has no text"),
        ([{"text": "x"}, {"text": " \n\t"}], r"a\.jsonl: row 2: the document has no text"),
        ([{"text": "x"}, {"text": None}], r"a\.jsonl: row 2: 'text' holds NoneType, not text"),
        ([{"text": 5}], r"a\.jsonl: row 1: 'text' holds int, not text"),
        ([{"text": "x"}, {"txt": "y"}], r"a\.jsonl: row 2: has no column 'text', only txt; set corpus.text_column"),
        ([{"text": "x"}, ["y"]], r"a\.jsonl: row 2: a list, not an object; mend or remove the row"),
        ([{"text": "x"}, {"text": "\ud800"}], r"a\.jsonl: row 2: no Unicode from character 1 on"),
        ([{"text": "x"}, "[" * 99_999], r"a\.jsonl: row 2: a str, not an object"),
        ([], r"a\.jsonl: empty; mend the file"),
    ],
)
def test_a_document_without_text_is_named_by_file_and_row(tmp_path: Path, rows: list[Any], complaint: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=complaint) as caught:
        list(documents(config(paths=[str(tmp_path / "a.jsonl")])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "where"), [("a.parquet", ""), ("a.jsonl", "row 2: "), ("a.json", "row 2: ")])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, where: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "whole"}\n{"text": "cut o\xff')
    with pytest.raises(UserError, match=f"{name}: {where}not readable as") as caught:
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


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{"text": ' + b"[" * 99_999, b'{"text": "a"}\n{"text": "b\xff"}'])
def test_what_the_library_cannot_read_is_told_with_its_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: row 2: (not readable as json|no Unicode)") as caught:
        list(documents(config(paths=[str(tmp_path / "a.jsonl")])))
    assert "\n" not in str(caught.value)


def test_a_fault_of_the_machine_is_no_fault_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])

    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "a.jsonl"))

    monkeypatch.setattr(sources, "read_column", failing)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read \(Input/output error\)$"):
        list(documents(config(paths=[str(tmp_path / "a.jsonl")])))


READ = """
import sys
from microlm.corpus.sources import documents
from microlm.parameters import CorpusConfig
print(len(list(documents(CorpusConfig(sys.argv[1], "gpt2", 0.2, None, 1024, paths=sys.argv[3:]), sys.argv[2]))))
print("datasets" in sys.modules)
"""


@pytest.mark.parametrize(("source", "count"), [("files", 126), ("packaged", 12_971)])
def test_text_that_is_here_needs_no_folder_for_a_cache(parts: Path, tmp_path: Path, source: str, count: int) -> None:
    command = [sys.executable, "-c", READ, source, str(parts), str(FIXTURE)]
    nowhere = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": "/dev/null/nohome"}
    ended = subprocess.run(command, env=nowhere, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.stdout.split(), ended.stderr) == ([str(count), "False"], "")
