"""The rehearsal's data: a tokenizer of bytes, a random teacher, made-up questions, and the tests' few documents."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from microlm.corpus.parts import EVALUATION, PARTS_DIRECTORY, validation_arrow
from microlm.corpus.shards import FORMAT, HEADER, MAGIC, VERSION, token_dtype
from microlm.corpus.tokenizer import END_OF_TEXT, Tokenizer
from microlm.corpus.tokenizer_format import ALPHABET, BYTE_LEVEL, byte_level_definition
from microlm.files import sealed, sha256_file, sha256_json, write_json, write_sums
from microlm.runtime.paths import SHARDS

DOCUMENTS = Path("tests/fixtures/documents.jsonl")  # of scale `smoke`
TEACHER = Path("data/tiny-teacher")
QUESTIONS = 48


def byte_tokenizer() -> Tokenizer:
    """A token for each byte and the end of text."""
    vocab = {character: byte for character, byte in ALPHABET.items()} | {END_OF_TEXT: 256}
    return Tokenizer("bytes", byte_level_definition(vocab, [], {END_OF_TEXT: 256}, BYTE_LEVEL), "the rehearsal")


def lay_out(workspace: Path, root: Path) -> None:
    """data/ of `workspace`."""
    tokenizer = byte_tokenizer()
    lines = (root / DOCUMENTS).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    documents = [np.concatenate(([tokenizer.eot_id], ids)) for ids in tokenizer.encode_batch(texts)]
    held = len(documents) // 10
    splits = {"val": np.concatenate(documents[:held]), "train": np.concatenate(documents[held:])}
    described = {key: getattr(tokenizer, key) for key in ("name", "fingerprint", "n_vocab", "eot_id")}
    write_shards(workspace / SHARDS, described, splits)
    tokenizer.save(workspace / SHARDS / "tokenizer")
    write_sums(workspace / SHARDS / "tokenizer")
    _write_teacher(workspace / TEACHER, tokenizer)
    _write_questions(workspace / PARTS_DIRECTORY, texts)


def write_shards(directory: Path, tokenizer: dict[str, object], splits: dict[str, np.ndarray]) -> None:
    """A folder that `TokenShards` reads, one shard a split; `tokenizer`: name, fingerprint, n_vocab, eot_id."""
    directory.mkdir(parents=True, exist_ok=True)
    dtype, entries = token_dtype(int(str(tokenizer["n_vocab"]))), {}
    for split, tokens in splits.items():
        path = directory / f"{split}-00000.bin"
        path.write_bytes(HEADER.pack(MAGIC, VERSION, dtype.itemsize, len(tokens)) + tokens.astype(dtype).tobytes())
        shard = {"file": path.name, "tokens": len(tokens), "sha256": sha256_file(path)}
        counts = {"documents": 1, "tokens": len(tokens), "text_bytes": len(tokens)}
        entries[split] = {**counts, "digest": sha256_json([shard["sha256"]]), "shards": [shard]}
    manifest = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer, "source": {}, "splits": entries}
    write_json(directory / "manifest.json", sealed(manifest))


def _write_teacher(directory: Path, tokenizer: Tokenizer) -> None:
    from tests.support.tiny_teacher import (  # with it transformers, which only a rehearsal needs here
        CONTEXT,
        tiny_llama,
    )

    tiny_llama(tokenizer, padded=320).save_pretrained(directory, safe_serialization=True)
    tokenizer.save(directory, model_max_length=CONTEXT)


def _write_questions(parts: Path, texts: list[str]) -> None:
    """In the packaged ones' columns, under their name: a text's beginning, and the ends of four texts as endings."""
    rows = []
    for number in range(QUESTIONS):
        endings = [texts[(number + k) % len(texts)].split(". ")[-1][:40] or "so it ends" for k in range(4)]
        label = int(hashlib.sha256(str(number).encode()).digest()[0]) % 4
        context = texts[number % len(texts)][:50].strip()
        rows.append(
            {
                **{"ind": number, "activity_label": "", "ctx_a": context, "ctx_b": "", "ctx": context},
                **{"endings": endings, "label": str(label), "source_id": f"made~{number}"},
                **{"split": "val", "split_type": "indomain"},
            }
        )
    member = validation_arrow("hellaswag/none")
    path = parts / EVALUATION / member
    path.parent.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)
    entry = {"version": "", "wheel": "", "sha256": "", "files": {member: sha256_file(path)}}
    write_json(parts / "manifest.json", {"format": "microlm-parts", "version": 1, "parts": {EVALUATION: entry}})
