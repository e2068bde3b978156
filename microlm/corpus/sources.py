"""Where documents come from: the packaged text, local files or a dataset on the hub, read through `datasets`."""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import datasets
import pyarrow

from microlm.config import CorpusConfig
from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.files import sha256_file

datasets.disable_progress_bars()
datasets.utils.logging.set_verbosity(
    logging.CRITICAL
)  # what it would say of an unreadable file, the error says in a line

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
READ_ERRORS = (OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError)


def documents(config: CorpusConfig, parts: Path = packaged.PARTS_DIRECTORY) -> Iterator[str]:
    """The texts of the corpus, one document each, always in the same order.

    Raises:
        UserError: no file matches, a column is missing, a document has no text, nothing is there at all, or the hub
            is out of reach.
    """
    reader: Callable[[], Iterator[str]] = {
        "packaged": lambda: _packaged(parts),
        "files": lambda: _files(config),
        "hub": lambda: _hub(config),
    }[config.source]
    empty = True
    for text in reader():
        empty = False
        yield text
    if empty:
        raise UserError(f"corpus.source {config.source}: holds no document; name one that does")


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


def _packaged(parts: Path) -> Iterator[str]:
    """Leads of Wikipedia articles and BoolQ's passages, mixed by a hash of the text, the same everywhere."""
    wiki = packaged.part_file(packaged.WIKI, packaged.WIKI_SUMMARIES, parts)
    boolq = packaged.part_file(packaged.EVALUATION, packaged.BOOLQ, parts)
    try:
        articles = json.loads(wiki.read_text(encoding="utf-8"))
        texts = [f"{article['title']}\n{article['extract']}" for article in articles.values()]
        passages = datasets.Dataset.from_file(str(boolq))["passage"]
    except (*READ_ERRORS, KeyError, AttributeError) as error:
        raise UserError(f"{parts}: damaged ({_short(error)}); make it again with: dvc repro -f -s fetch") from None
    texts += sorted({passage.strip() for passage in passages})
    # not the hash that chooses the validation split: in its order, validation would come first
    texts.sort(key=lambda text: hashlib.sha256(b"order\0" + text.encode()).digest())
    return iter(texts)


def matching_files(paths: Iterable[str]) -> list[Path]:
    """Files named by `paths` (globs; ** crosses folders), sorted, each once. UserError if one matches nothing."""
    found: set[Path] = set()
    for pattern in paths:
        matches = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]
        if not matches:
            raise UserError(
                f"corpus.paths: no file matches {pattern!r} (seen from {Path.cwd()}); correct it in params.yaml"
            )
        for path in matches:
            if path.suffix not in BUILDERS:
                raise UserError(f"{path}: cannot be read as text; corpus.paths takes {', '.join(BUILDERS)}")
        found.update(matches)
    return sorted(found)


def _files(config: CorpusConfig) -> Iterator[str]:
    """Every document of every file. A .txt file is one document; its text needs no column."""
    for path in matching_files(config.paths or []):
        if not path.stat().st_size:
            raise UserError(f"{path}: empty; mend the file or leave it out of corpus.paths")
        builder = BUILDERS[path.suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        try:
            rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
            yield from _texts(rows, "text" if builder == "text" else config.text_column, str(path))
        except READ_ERRORS as error:
            raise UserError(f"{path}: not readable as {builder} ({_short(error)})") from None


def _hub(config: CorpusConfig) -> Iterator[str]:
    where = f"{config.dataset} at {config.revision}"
    try:
        rows = datasets.load_dataset(
            config.dataset, name=config.subset, split="train", streaming=True, revision=config.revision
        )
        yield from _texts(rows, config.text_column, where)
    except READ_ERRORS as error:
        mend = "check corpus.dataset, subset and revision and the network, or use source: files"
        raise UserError(f"{where}: not readable from the hub ({_short(error)}); {mend}") from None


def _texts(rows: Iterable[dict[str, Any]], column: str, where: str) -> Iterator[str]:
    """The texts in `column`, each checked. Rows are counted from 1."""
    for number, row in enumerate(rows, start=1):
        if column not in row:
            raise UserError(
                f"{where}: has no column {column!r}, only {', '.join(row)}; set corpus.text_column to one of them"
            )
        text = row[column]
        if not isinstance(text, str):
            raise UserError(
                f"{where}: row {number}: {column!r} holds {type(text).__name__}, not text; mend or remove the row"
            )
        if not text.strip():
            raise UserError(f"{where}: row {number}: the document has no text; mend or remove the row")
        yield text


def _short(error: BaseException) -> str:
    """An error of a library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
