"""Promises of the tasks' files: read as published, from a folder or the hub, or refused in one line."""

import codecs
import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from microlm.errors import UserError
from microlm.evaluation.tasks.data import REVISIONS, DataNotAvailable, Rows, read_rows
from microlm.evaluation.tasks.task import TASKS, Task
from tests.conftest import ROOT
from tests.support.clones import FIXTURES

TASK_FILES = FIXTURES / "evaluation"
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


LABELS = {
    **{
        "stsb": {5.0, 2.4, 0.0, 4.25},
        "arc_easy": {0, 1, 2},
        "arc_challenge": {0, 4},
        "sciq": {3},
        "social_iqa": {0, 1, 2},
    },
    **{"commonsense_qa": {0, 4}, "lambada_openai": {0}},
}


def read_published(task: Task, folder: Path = TASK_FILES) -> Rows:
    """From the files below `folder` and nowhere else."""
    return read_rows(task, folder, hub=False, parts=folder / "no parts")


def write_parquet(path: Path, task: Task, rows: list[dict]) -> None:
    """`rows` in the hub's schema: a label of -1 where there is none, and a column that nobody asked for."""
    table = [_as_the_hub_has_it(task, row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row | {"idx": number} for number, row in enumerate(table)]), path)


def _as_the_hub_has_it(task: Task, row: dict) -> dict:
    found, label = {name: row[name] for name in task.columns}, row["label"]
    if len(task.options) > 1:
        found |= dict(zip(task.options, row["endings"], strict=True))
    elif task.gold == "answerKey":
        found["choices"] = {"text": row["endings"], "label": [*"ABCDE"][: len(row["endings"])]}
        return found | {"answerKey": "" if label < 0 else "ABCDE"[label]}
    elif task.options:
        found["endings"] = row["endings"]
    if task.gold in (*task.options, ""):
        return found
    kind = {"hellaswag": str, "stsb": float, "winogrande": str, "social_iqa": str}.get(task.name, int)
    return found | {task.gold: kind(label + task.first * (label >= 0))}


def hub_copy(task: Task, folder: Path) -> Path:
    """Where a copy of the hub's repository below `folder` has the task's file."""
    source = task.source
    return folder / source.dataset.partition("/")[2] / source.file if source.dataset else folder / source.local[-1]


@every_task
def test_each_task_is_read_from_the_file_its_authors_publish(task: Task) -> None:
    read = read_published(task)
    assert read.provenance["source"] == "files" and Path(read.provenance["file"]).is_relative_to(TASK_FILES)
    assert {name for row in read.rows for name in row} >= {"id", "label", *task.columns}
    labels = {row["label"] for row in read.rows}
    assert labels == LABELS.get(task.name, {*range(len(task.choices) or 2)})


@every_task
def test_the_hubs_parquet_gives_the_very_rows_of_the_authors_file(task: Task, tmp_path: Path) -> None:
    authors = read_published(task)
    write_parquet(hub_copy(task, tmp_path), task, authors.rows)
    hubs = read_published(task, tmp_path)
    strip = [{name: row[name] for name in row if name != "id"} for row in authors.rows]
    assert [{name: row[name] for name in row if name != "id"} for row in hubs.rows] == strip
    if task.name != "snli":  # whose numbers have gaps
        assert hubs.provenance["sha256"] == authors.provenance["sha256"]


def test_quotation_marks_byte_order_marks_and_trailing_spaces_are_text_or_nothing() -> None:
    assert [row["sentence"] for row in read_published(TASKS["cola"]).rows][2:] == [
        '"Nobody", she said, heard the bell.',
        'Heard "the bell nobody.',
    ]
    assert read_published(TASKS["mrpc"]).rows[0]["label"] == 1
    assert read_published(TASKS["sst2"]).rows[0]["sentence"] == "a film of rare charm and wit . "


@every_task
def test_what_an_editor_leaves_in_a_file_and_its_folders_name_change_nothing(task: Task, tmp_path: Path) -> None:
    """A byte order mark, line ends of Windows and an empty last line; a name that would be a pattern or an address."""
    authors = read_published(task)
    path = Path(authors.provenance["file"])
    saved = tmp_path / "hub:tasks [1]*%20 ü" / path.relative_to(TASK_FILES)
    saved.parent.mkdir(parents=True)
    content = path.read_bytes()
    if path.suffix in (".jsonl", ".tsv"):
        content = codecs.BOM_UTF8 + content.removeprefix(codecs.BOM_UTF8).replace(b"\n", b"\r\n") + b"\r\n"
    saved.write_bytes(content)
    assert read_published(task, tmp_path / "hub:tasks [1]*%20 ü").rows == authors.rows


def test_pairs_that_annotators_disagreed_on_are_left_out_and_counted() -> None:
    read = read_published(TASKS["snli"])
    assert [row["id"] for row in read.rows] == ["0", "1", "3", "5"]
    assert read.provenance["unlabelled"] == 2 and read.provenance["rows"] == 4


@pytest.mark.parametrize("task", [task for task in TASKS.values() if task.gold not in (*task.options, "")])
def test_a_split_without_labels_is_refused(task: Task, tmp_path: Path) -> None:
    rows = [row | {"label": -1} for row in read_published(task).rows]
    write_parquet(hub_copy(task, tmp_path), task, rows)
    with pytest.raises(UserError, match=rf"\.parquet: row 1: the label is -1.*give the {task.split} split"):
        read_published(task, tmp_path)


def test_one_unlabelled_row_is_refused_where_all_should_have_labels(tmp_path: Path) -> None:
    rows = read_published(TASKS["qqp"]).rows
    write_parquet(hub_copy(TASKS["qqp"], tmp_path), TASKS["qqp"], [*rows[:2], rows[2] | {"label": -1}])
    with pytest.raises(UserError, match="row 3: the label is -1, as in 1 of 3 rows"):
        read_published(TASKS["qqp"], tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "rte",
            b"\tnot_entailment\n",
            b"\tperhaps\n",
            r"row 2: 'label' is 'perhaps', not entailment, not_entailment or",
        ),
        (
            "rte",
            b"sentence2\tlabel",
            b"sentence2\tgold",
            r"row 1: no column 'label'.*test split.*validation split of rte",
        ),
        ("rte", b"sentence1\t", b"first\t", r"row 1: no column 'sentence1', only index, first"),
        ("rte", b"died.\t", b"died.", r"line 3: 3 columns, not 4"),
        (
            "cola",
            b"xx02\t1\t",
            b"xx02\t2\t",
            r"row 3: 'label' is '2', not unacceptable, acceptable or a number from 0 to 1",
        ),
        ("stsb", b"2.400", b"5.200", r"row 2: 'score' is '5.200', not a number from 0 to 5"),
        ("stsb", b"2.400", b"nan", r"row 2: 'score' is 'nan'"),
        (
            "snli",
            b'"gold_label": "neutral"',
            b'"gold_label": "maybe"',
            r"row 2: 'gold_label' is 'maybe', not entailment",
        ),
        ("snli", b'{"annotator', b"{annotator", r"line 1: not JSON"),
        ("hellaswag", b'"label": 1', b'"label": 4', r"row 2: 'label' is 4, not a number from 0 to 3"),
        ("hellaswag", b'"starts to boil.", ', b"", r"row 1: not a context with 4 endings"),
        ("cb", b'"I never knew that the shop had a cellar."', b"7", r"row 1: 'premise' holds 7, not text"),
        ("wnli", b"index", b"\xff\xfe", r"not readable as tsv .*published file"),
        (
            "arc_easy",
            b'"answerKey": "B"',
            b'"answerKey": "E"',
            r"row 1: 'answerKey' is 'E', not A, B, C, D or a number",
        ),
        ("arc_easy", b', "the cow", "the goat"]', b"]", r"row 3: not a context with 3 or 4 or 5 endings"),
        ("piqa", b'"sol2": "leave it in the sun"', b'"sol2": ""', r"row 2: not a context with 2 endings"),
        ("social_iqa", b'"label": "3"', b'"label": "0"', r"row 3: 'label' is '0', not a number from 1 to 3"),
        ("sciq", b'"distractor2": "silk"', b'"distractor": "silk"', r"row 1: no column 'distractor2'"),
    ],
)
def test_a_wrong_file_is_named_with_row_and_mend(
    name: str, old: bytes, new: bytes, message: str, tmp_path: Path
) -> None:
    path = Path(read_published(TASKS[name]).provenance["file"])
    damaged = tmp_path / path.relative_to(TASK_FILES)
    damaged.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    assert old in content
    damaged.write_bytes(content.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as caught:
        read_published(TASKS[name], tmp_path)
    assert str(damaged) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x07" * 5000, b"PAR1"])
def test_a_damaged_parquet_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = hub_copy(TASKS["qnli"], tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"validation-00000-of-00001\.parquet: not readable as parquet"):
        read_published(TASKS["qnli"], tmp_path)


def test_a_file_is_held_against_the_checksums_beside_it(tmp_path: Path) -> None:
    shutil.copytree(TASK_FILES / "CoLA", tmp_path / "CoLA")
    digest = hashlib.sha256((tmp_path / "CoLA/dev.tsv").read_bytes()).hexdigest()
    (tmp_path / "CoLA/SHA256SUMS").write_text(f"{digest}  dev.tsv\n{'0' * 64} *train.tsv\n")
    assert read_published(TASKS["cola"], tmp_path).provenance["file_sha256"] == digest
    (tmp_path / "CoLA/SHA256SUMS").write_text(f"{'0' * 64}  dev.tsv\n")
    with pytest.raises(UserError, match=r"CoLA/dev\.tsv: its sha256 is not the one in .*SHA256SUMS"):
        read_published(TASKS["cola"], tmp_path)


@every_task
def test_a_task_without_data_is_named_with_what_was_tried_and_the_mend(task: Task, tmp_path: Path) -> None:
    with pytest.raises(DataNotAvailable) as caught:
        read_rows(task, tmp_path, hub=False, parts=tmp_path)
    reason = str(caught.value)
    assert reason.startswith(f"{task.name}: ") and "\n" not in reason
    assert all(name in reason for name in (*task.source.local, str(tmp_path), "connect to the network"))
    assert ("dvc repro fetch" in reason) == (task.source.member is not None)


NOBODY = "http://127.0.0.1:9"  # nothing answers there
HUB_CLIENT = """
import json
from microlm.evaluation.tasks.data import DataNotAvailable, read_rows
from microlm.evaluation.tasks.task import TASKS
try:
    read = read_rows(TASKS["cola"], None)
    print(json.dumps([read.rows, read.provenance]))
except DataNotAvailable as error:
    print(json.dumps(str(error)))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as serves one file of one data set at one revision."""

    protocol_version = "HTTP/1.1"
    content = b""

    def do_GET(self) -> None:
        source = TASKS["cola"].source
        repository, revision = source.dataset, REVISIONS[source.dataset]
        bodies = {
            f"/api/datasets/{repository}/revision/{revision}": b"{}",
            f"/datasets/{repository}/resolve/{revision}/{source.file}": self.content,
        }
        body = bodies.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", f'"{hashlib.sha1(body or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


def ask_hub(cache: Path, endpoint: str, offline: str = "0") -> list | str:
    environment = {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HUB_CLIENT]
    done = subprocess.run(command, env=os.environ | environment, cwd=cache, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_hub_is_read_at_the_pinned_revision_once_and_from_its_cache_afterwards(tmp_path: Path) -> None:
    authors = read_published(TASKS["cola"])
    write_parquet(tmp_path / "cola.parquet", TASKS["cola"], authors.rows)
    Hub.content = (tmp_path / "cola.parquet").read_bytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    read = ask_hub(tmp_path, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    rows, provenance = read
    assert rows == authors.rows and provenance["sha256"] == authors.provenance["sha256"]
    assert provenance["source"] == "hub" and provenance["revision"] == REVISIONS["nyu-mll/glue"]
    assert ask_hub(tmp_path, NOBODY, offline="1") == read


def test_no_network_means_data_not_available(tmp_path: Path) -> None:
    reason = ask_hub(tmp_path, NOBODY)
    assert "nyu-mll/glue is not to be had from the hub" in reason and "put CoLA/dev.tsv below a folder" in reason
