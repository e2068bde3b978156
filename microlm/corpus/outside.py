"""Text of another kind than the corpus, as token shards of one split: data/outside.

What is also in the corpus is left out: there a student would be asked what it has read. Without `evaluation.outside`
the folder holds a manifest and no split.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from microlm.corpus import parts as packaged
from microlm.corpus import sources
from microlm.corpus.kinds import FILES, packaged_texts
from microlm.corpus.outside_source import KEY, MOST_TOKENS, as_corpus, keys
from microlm.corpus.shards import FORMAT, VERSION, TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.corpus.writing import COUNTS, SplitWriter
from microlm.errors import UserError
from microlm.files import atomic_directory, sealed, write_json
from microlm.parameters import ScaleConfig

HEAD = 64  # tokens by which a document is known again
CHUNK_TOKENS = 1 << 24
FEWEST_WINDOWS = 2  # one gives no interval


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
    if at.evaluation.outside is None:
        with atomic_directory(target) as folder:
            write_json(folder / "manifest.json", sealed(manifest))
        return {**dict.fromkeys(COUNTS, 0), "removed": 0, "kinds": {}}
    tokenizer = load_tokenizer(corpus / "tokenizer")
    documents = _documents(at, tokenizer, parts)
    kept = new_documents(documents, (shards, TokenShards(corpus, "train")), tokenizer.eot_id)
    _refuse_too_few(kept, len(documents), at.batch.seq_len)
    kinds: dict[str, Counter[str]] = {}
    with atomic_directory(target) as folder:
        writer = SplitWriter(folder, "outside", tokenizer, at.corpus.shard_tokens)
        for document in kept:
            tokens = np.concatenate(([tokenizer.eot_id], document.tokens)).astype(shards.dtype)
            text_bytes = int(tokenizer.byte_lengths[tokens].sum())
            writer.write(tokens, text_bytes)
            counted = zip(COUNTS, (1, len(tokens), text_bytes), strict=True)
            kinds.setdefault(document.kind, Counter()).update(dict(counted))
        manifest |= {"source": _described(at, parts), "splits": {"outside": writer.close()}}
        write_json(folder / "manifest.json", sealed(manifest))
    counts = {key: manifest["splits"]["outside"][key] for key in COUNTS}
    return {**counts, "removed": len(documents) - len(kept), "kinds": {name: dict(of) for name, of in kinds.items()}}


def new_documents(documents: list[Document], corpus: Iterable[TokenShards], eot_id: int) -> list[Document]:
    """Those that begin as no document of the corpus does: by their first HEAD tokens, or all and the end."""
    heads = [np.append(document.tokens, eot_id)[:HEAD].astype(np.int64) for document in documents]
    by_start: dict[int, list[int]] = {}
    for number, head in enumerate(heads):
        by_start.setdefault(_key(head[0], head[min(1, len(head) - 1)]), []).append(number)
    wanted, found = np.array(sorted(by_start)), set()
    for shards in corpus:
        for chunk, starts in _beginnings(shards, eot_id):
            started = _key(chunk[starts], chunk[starts + 1])
            here = np.isin(started, wanted)
            for start, key in zip(starts[here], started[here], strict=True):
                found |= {
                    n for n in by_start[int(key)] if np.array_equal(chunk[start : start + len(heads[n])], heads[n])
                }
    return [document for number, document in enumerate(documents) if number not in found]


def _beginnings(shards: TokenShards, eot_id: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of the split, int64, with the places in each where a document begins; HEAD tokens more are behind it."""
    end = np.full(HEAD + 1, eot_id)
    for first in range(0, shards.n_tokens, CHUNK_TOKENS):
        length = min(CHUNK_TOKENS + HEAD + 1, shards.n_tokens - first)
        chunk = np.concatenate((shards.read(first, length), end)).astype(np.int64)
        yield chunk, np.flatnonzero(chunk[: min(CHUNK_TOKENS, length)] == eot_id) + 1


def _key(first: Any, second: Any) -> Any:
    """Two tokens as one number."""
    return first * 2**32 + second


def _documents(at: ScaleConfig, tokenizer: Tokenizer, parts: Path) -> list[Document]:
    """Encoded, in order, until they are MOST_TOKENS."""
    found, total = [], 0
    for kind, text in _texts(at, parts):
        found.append(Document(kind, np.asarray(tokenizer.encode(text), np.uint32)))
        total += 1 + len(found[-1].tokens)
        if total >= MOST_TOKENS:
            break
    return found


def _texts(at: ScaleConfig, parts: Path) -> Iterator[tuple[str, str]]:
    """Kind and text of each document; packaged kinds are mixed, so that any windows are of all."""
    wanted = at.evaluation.outside
    if wanted == "packaged":
        texts = packaged_texts(parts)
        places = {kind: (np.arange(len(texts[kind])) + 0.5) / len(texts[kind]) for kind in texts if texts[kind]}
        order = sorted((place, kind, number) for kind in places for number, place in enumerate(places[kind]))
        yield from ((kind, texts[kind][number]) for _, kind, number in order)
        return
    text = as_corpus(wanted, at.corpus)
    for batch in sources.batches(text, parts, keys=keys()):
        yield from ((text.source, one) for one in batch.texts)


def _described(at: ScaleConfig, parts: Path) -> dict[str, Any]:
    wanted = at.evaluation.outside
    if wanted != "packaged":
        return sources.describe(as_corpus(wanted, at.corpus), parts)
    files = packaged.read_manifest(parts)["parts"][packaged.EVALUATION]["files"]
    return {"source": "packaged", "files": {member: files[member] for member in sorted(set(FILES.values()))}}


def _refuse_too_few(kept: list[Document], read: int, seq_len: int) -> None:
    tokens, needed = sum(1 + len(document.tokens) for document in kept), FEWEST_WINDOWS * seq_len + 1
    if tokens < needed:
        removed = f", {read - len(kept)} of {read} documents left out that are in the corpus too" * (len(kept) < read)
        raise UserError(
            f"{KEY}: {tokens} tokens{removed}, and {FEWEST_WINDOWS} windows of batch.seq_len={seq_len} need {needed}; "
            "name more text of another kind, or set it to null"
        )
