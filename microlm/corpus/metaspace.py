"""SentencePiece's BPE as a tokenizer.json or a GGUF file holds it: the tokens of a teacher, never those of a corpus.

Such a tokenizer (Gemma, Llama 2, Mistral 7B, Phi 3) writes a space as U+2581, merges what it knows and spells the rest
byte by byte. Its ids come from the Hugging Face `tokenizers` implementation of the same definition; here stands what
bytes each of them is.

Which definitions are taken: metaspace_format.py.
"""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers

from microlm.corpus.metaspace_format import (
    ENDS,
    SPACE,
    as_it_is,
    begin_ids,
    ids_of_bytes,
    is_metaspace,
    piece_bytes,
    unmodelled,
)
from microlm.corpus.tokenizer import id_count, json_tokenizer
from microlm.errors import UserError
from microlm.files import sha256_json


class TeacherTokenizer(Protocol):
    """What a teacher's tokenizer is to those who read text with it. `Tokenizer` says what each of these is.

    Attributes:
        begin: ids that its model expects before every text.
    """

    name: str
    n_vocab: int
    eot_id: int
    begin: tuple[int, ...]
    special_tokens: dict[str, int]
    fingerprint: str
    byte_lengths: np.ndarray

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def encode_as_it_is(self, text: str) -> np.ndarray: ...

    def encode_piece(self, content: bytes) -> list[int]: ...

    def bytes_of(self, token: int) -> bytes: ...


class MetaspaceTokenizer:
    """A SentencePiece BPE with byte fallback; the spelling of a special token in a text is plain text.

    Attributes:
        n_vocab: number of ids, without padding.
        eot_id: id of the end-of-text token.
        begin: the ids that its template puts before a text.
        special_tokens: {spelling: id}.
        fingerprint: sha256 over what decides the ids.
        byte_lengths: int32 [n_vocab], bytes of text behind each id; 0 for special tokens.
    """

    def __init__(self, name: str, definition: dict[str, Any], source: str) -> None:
        """`definition` is the content of a tokenizer.json, `source` where it came from (for error messages).

        Raises:
            UserError: a setting of it would not be obeyed.
        """
        self.name, self._definition = name, definition
        added, vocab = definition.get("added_tokens") or [], definition["model"].get("vocab") or {}
        for told in unmodelled(definition):
            raise UserError(f"{source}: {told}; choose another teacher")
        self.special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self.eot_id = next(self.special_tokens[end] for end in ENDS if end in self.special_tokens)
        self.begin = begin_ids(definition.get("post_processor"))
        found = {token["content"]: token["id"] for token in added if not token["special"]}
        self.n_vocab = id_count([*vocab.values(), *found.values(), *self.special_tokens.values()])
        self._bytes = [b""] * self.n_vocab
        for piece, token in (vocab | found).items():
            if piece not in self.special_tokens:
                self._bytes[token] = piece_bytes(piece)
        self._of_byte = ids_of_bytes(vocab)
        self.byte_lengths = np.array([len(content) for content in self._bytes], np.int32)
        decisive = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        self.fingerprint = sha256_json({key: definition.get(key) for key in decisive} | {"begin": self.begin})
        self._plain = _implementation(definition | as_it_is(definition))

    @cached_property
    def reference(self) -> tokenizers.Tokenizer:
        """The whole definition, a space before the text where it asks for one."""
        return _implementation(self._definition)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32, by the whole definition; without what its template adds."""
        return [np.array(self.reference.encode(text, add_special_tokens=False).ids, np.uint32) for text in texts]

    def encode_as_it_is(self, text: str) -> np.ndarray:
        """Ids of just the bytes of `text`, uint32: no space is put before it.

        U+2581 itself, which the definition would take for a space, is spelled byte by byte.
        """
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            if i:
                ids += self.encode_piece(SPACE.encode())
            if part:
                ids += self._plain.encode(part, add_special_tokens=False).ids
        return np.array(ids, np.uint32)

    def encode_piece(self, content: bytes) -> list[int]:
        """Ids of any bytes, one by one."""
        return [self._of_byte[byte] for byte in content]

    def bytes_of(self, token: int) -> bytes:
        """Bytes of text behind an id: none for a special token."""
        return self._bytes[token]


def _implementation(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    built = tokenizers.Tokenizer.from_str(json.dumps(definition | {"post_processor": None, "decoder": None}))
    built.encode_special_tokens = True
    return built


def teacher_tokenizer(tokenizer_json: Path, name: str | None = None) -> TeacherTokenizer:
    """Of a Hugging Face tokenizer.json. UserError if it is neither a byte-level BPE nor SentencePiece's with bytes."""
    try:
        definition = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        definition = None  # the other reader says what is wrong
    if is_metaspace(definition):
        try:
            return MetaspaceTokenizer(name or str(tokenizer_json), definition, str(tokenizer_json))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{tokenizer_json}: not a whole tokenizer.json ({error!r}); choose another teacher"
            ) from None
    return json_tokenizer(tokenizer_json, name)
