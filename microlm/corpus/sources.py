"""Where documents come from: the packaged text, local files or a dataset on the hub, read through `datasets`."""

import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from microlm.corpus import hub_dataset
from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.files import sha256_file
from microlm.parameters import CorpusConfig

if TYPE_CHECKING:
    from datasets import IterableDataset

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Position:
    """How far a corpus has been read: `row` documents of file number `file`, and all of the files before it."""

    file: int = 0
    row: int = 0


@dataclass(frozen=True)
class Keys:
    """Of params.yaml, where a text is named: what messages tell a person to mend."""

    source: str = "corpus.source"
    paths: str = "corpus.paths"
    column: str = "corpus.text_column"
    hub: str = "corpus"


CORPUS = Keys()


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
    key: str  # of params.yaml, that names the column
    open: "Callable[[], IterableDataset]"
    complaint: str
    mend: str = ""


def _read_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return OSError, ValueError, pyarrow.ArrowException, hub_dataset.library().exceptions.DatasetsError


def batches(
    config: CorpusConfig,
    parts: Path = packaged.PARTS_DIRECTORY,
    start: Position | None = None,
    keys: Keys = CORPUS,
) -> Iterator[Documents]:
    """The documents of the corpus from `start` on, always in the same order, at most BATCH_DOCUMENTS at a time.

    Files before `start` are not opened; the rows before it are read again, but not looked at.

    Raises:
        UserError: no file matches, a column is missing, a document has no text, nothing is there at all, or the hub
            is out of reach.
    """
    files = {
        "packaged": lambda: [_packaged(parts)],
        "files": lambda: _files(config, keys),
        "hub": lambda: _hub(config, keys),
    }
    start = start or Position()
    empty = start == Position()
    for number, file in enumerate(files[config.source]()):
        row = start.row if number == start.file else 0
        if number < start.file:
            continue
        try:
            for texts in _texts(file, row):
                empty = False
                row += len(texts)
                yield Documents(texts, Position(number, row))
        except _read_errors() as error:
            raise UserError(f"{file.name}: {file.complaint} ({_short(error)}){file.mend}") from None
    if empty:
        raise UserError(f"{keys.source} {config.source}: holds no document; name one that does")


def documents(config: CorpusConfig, parts: Path = packaged.PARTS_DIRECTORY) -> Iterator[str]:
    """The texts of the corpus, one document each: `batches` from the start, one by one."""
    for batch in batches(config, parts):
        yield from batch.texts


def describe(config: CorpusConfig, parts: Path = packaged.PARTS_DIRECTORY) -> dict[str, Any]:
    """What the manifest of the shards says about the source: enough to tell whether a text is the same text."""
    if config.source == "packaged":
        entries = packaged.read_manifest(parts)["parts"]
        members = ((packaged.WIKI, packaged.WIKI_SUMMARIES), (packaged.EVALUATION, packaged.BOOLQ))
        return {
            "source": "packaged",
            "files": {f"{name}/{member}": entries[name]["files"][member] for name, member in members},
        }
    if config.source == "files":
        return {
            "source": "files",
            "files": {str(path): sha256_file(path) for path in matching_files(config.paths or [])},
        }
    return {"source": "hub", "dataset": config.dataset, "subset": config.subset, "revision": config.revision}


def _packaged(parts: Path) -> _File:
    """Leads of Wikipedia articles and BoolQ's passages, mixed by a hash of the text, the same everywhere."""
    wiki = packaged.part_file(packaged.WIKI, packaged.WIKI_SUMMARIES, parts)
    boolq = packaged.part_file(packaged.EVALUATION, packaged.BOOLQ, parts)
    try:
        articles = json.loads(wiki.read_text(encoding="utf-8"))
        texts = [f"{article['title']}\n{article['extract']}" for article in articles.values()]
        passages = hub_dataset.library().Dataset.from_file(str(boolq))["passage"]
    except (*_read_errors(), KeyError, AttributeError) as error:
        raise UserError(f"{parts}: damaged ({_short(error)}); make it again with: dvc repro -f -s fetch") from None
    texts += sorted({passage.strip() for passage in passages})
    # not the hash that chooses the validation split: in its order, validation would come first
    texts.sort(key=lambda text: hashlib.sha256(b"order\0" + text.encode()).digest())
    rows = hub_dataset.library().Dataset.from_dict({"text": texts})
    return _File(str(parts), "text", CORPUS.column, rows.to_iterable_dataset, "not readable")


def matching_files(paths: Iterable[str], key: str = CORPUS.paths) -> list[Path]:
    """Files named by `paths` (globs; ** crosses folders), sorted, each once. UserError if one matches nothing.

    Args:
        key: of params.yaml, that holds `paths`.
    """
    found: set[Path] = set()
    for pattern in paths:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]
        if not matches:
            raise UserError(f"{key}: no file matches {pattern!r} (seen from {Path.cwd()}); correct it in params.yaml")
        for path in matches:
            if path.suffix not in BUILDERS:
                raise UserError(f"{path}: cannot be read as text; {key} takes {', '.join(BUILDERS)}")
        found.update(matches)
    return sorted(found)


def _files(config: CorpusConfig, keys: Keys) -> Iterator[_File]:
    """A .txt file is one document; its text needs no column."""
    for path in matching_files(config.paths or [], keys.paths):
        if not path.stat().st_size:
            raise UserError(f"{path}: empty; mend the file or leave it out of {keys.paths}")
        builder = BUILDERS[path.suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        column = "text" if builder == "text" else config.text_column
        opened = _opener(builder, str(path), **options)
        yield _File(str(path), column, keys.column, opened, f"not readable as {builder}")


def _hub(config: CorpusConfig, keys: Keys) -> list[_File]:
    """The files of the dataset's training split, in its order."""
    name = f"{config.dataset} at {config.revision}"
    complaint, mend = "not readable from the hub", f"; {hub_dataset.advice(keys.hub)}"
    try:
        builder = hub_dataset.find_dataset(config, keys.hub)
        files = builder.config.data_files["train"]
    except (*_read_errors(), KeyError) as error:
        raise UserError(f"{name}: {complaint} ({_short(error)}){mend}") from None
    return [
        _File(
            f"{name}, {Path(str(file)).name}",
            config.text_column,
            keys.column,
            _opener(builder.name, str(file)),
            complaint,
            mend,
        )
        for file in files
    ]


def _opener(builder: str, file: str, **options: Any) -> "Callable[[], IterableDataset]":
    return lambda: hub_dataset.library().load_dataset(
        builder, data_files=[file], split="train", streaming=True, **options
    )


def _texts(file: _File, row: int) -> Iterator[list[str]]:
    """The texts of `file` behind its first `row` rows, each checked. Rows are counted from 1 in messages."""
    # by batches: a row at a time, `datasets` needs fifteen times as long
    for columns in file.open().skip(row).iter(BATCH_DOCUMENTS):
        if file.column not in columns:
            raise UserError(
                f"{file.name}: has no column {file.column!r}, only {', '.join(columns)}; set {file.key} to one of them"
            )
        texts = columns[file.column]
        for number, text in enumerate(texts, start=row + 1):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(
                    f"{file.name}: row {number}: {file.column!r} holds {kind}, not text; mend or remove the row"
                )
            if not text.strip():
                raise UserError(f"{file.name}: row {number}: the document has no text; mend or remove the row")
        row += len(texts)
        yield texts


def _short(error: BaseException) -> str:
    """An error of a library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
