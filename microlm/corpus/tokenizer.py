"""Byte-level BPE, run by tiktoken, checked against the Hugging Face `tokenizers` implementation.

Whatever a tokenizer is built from (GGUF metadata, GPT-2's two files, a tokenizer.json), it first becomes the dictionary
that a tokenizer.json holds; ids, pattern and the reference implementation all follow from that one definition.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the reference is used on few texts; its pool outlives forks

import numpy as np
import tiktoken
import tokenizers

from microlm.corpus import parts as packaged
from microlm.corpus.tokenizer_format import (
    ALPHABET,
    BYTE_LEVEL,
    DIGITS,
    GPT2_PATTERN,
    byte_level_definition,
    cutting_pattern,
    made_by_merges,
    refuse_unmodelled,
    vocabulary_bytes,
)
from microlm.errors import UserError
from microlm.files import atomic_file, check_sums, sha256_bytes, sha256_json, write_json
from microlm.runtime.paths import seen_from

END_OF_TEXT = "<|endoftext|>"

# Where implementations of the same tokenizer are known to differ.
AWKWARD_TEXTS = (
    "",
    " ",
    "\n\n\t  \r\n ",
    "  42  7 x1y22 ½²³ ٣٤ Ⅻ",
    "I'm you'LL we've 'tis ''s",
    "tabs\tand    runs  of      spaces   ",
    "naïve nai\u0308ve ﬁ 한국어 日本語 ไทย שלום 👩‍👩‍👧 \u200b\ufeff\u0085\u2028",
    "\x00\x04\x1f bytes \U0006d000 without ids",
    "<|endoftext|> <|im_start|>|||IP_ADDRESS|||",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!----------",
)


def id_count(ids: Iterable[int]) -> int:
    """V, by which every vocabulary is counted: 1 + the largest id. Ids may have gaps; what an embedding has beyond V is
    padding."""
    return 1 + max(ids)


class _Splitter:
    """Added tokens that are looked for together: the leftmost, the longest of those that begin there.

    Attributes:
        ids: {spelling: id} of those that cut a text. Special ones are found too, and left in it.
    """

    def __init__(self, tokens: Sequence[dict[str, Any]], spelled: Callable[[str], str]) -> None:
        self.ids = {spelled(token["content"]): token["id"] for token in tokens if not token["special"]}
        longest_first = sorted((spelled(token["content"]) for token in tokens), key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, longest_first)))
        # enough to tell that none is in a text: a run of 24 spaces is not there where a run of 2 is not
        self._shortest = [a for a in self.ids if not any(b in a for b in self.ids if b != a)]

    def __call__(self, text: str) -> list[str | int]:
        """The text as pieces and ids."""
        if not any(token in text for token in self._shortest):
            return [text]
        pieces, done = [], 0
        for match in self._found.finditer(text):
            if (token := self.ids.get(match[0])) is not None:
                pieces += [text[done : match.start()], token]
                done = match.end()
        return [piece for piece in (*pieces, text[done:]) if piece != ""]


class Tokenizer:
    """A byte-level BPE tokenizer; the spelling of a special token in a text is plain text.

    Attributes:
        n_vocab: number of ids, without padding.
        eot_id: id of the end-of-text token, which stands before every document.
        begin: no id is put before a text.
        special_tokens: {spelling: id}.
        fingerprint: sha256 over what decides the ids: bytes of each, special and added tokens, pattern, normalizer.
        byte_lengths: int32 [n_vocab], bytes of text behind each id; 0 for special tokens.
    """

    begin: tuple[int, ...] = ()

    def __init__(self, name: str, definition: dict[str, Any], source: str) -> None:
        """`definition` is the content of a tokenizer.json, `source` where it came from (for error messages)."""
        self.name = name
        self._definition, self._source = definition, source
        model, added = definition["model"], definition.get("added_tokens") or []
        self.special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._added = {token["content"]: token["id"] for token in added if not token["special"]}
        if END_OF_TEXT not in self.special_tokens:
            raise UserError(
                f"{source}: has no special token {END_OF_TEXT} to stand between documents; use another tokenizer"
            )
        refuse_unmodelled(definition, source)
        self.eot_id = self.special_tokens[END_OF_TEXT]
        reserved = {token["id"] for token in added}
        ordinary = vocabulary_bytes(model, reserved, source)
        self.n_vocab = id_count(chain(ordinary, reserved))
        self._bytes = [b""] * self.n_vocab
        for token, content in chain(ordinary.items(), ((i, text.encode()) for text, i in self._added.items())):
            self._bytes[token] = content
        self.byte_lengths = np.array([len(content) for content in self._bytes], np.int32)
        self._pattern, normalizer = cutting_pattern(definition["pre_tokenizer"]), definition.get("normalizer")
        self._normalizer = tokenizers.normalizers.NFC() if normalizer else None
        before, after = ([token for token in added if bool(token.get("normalized")) is late] for late in (False, True))
        self._cut_before, self._cut_after = _Splitter(before, str), _Splitter(after, self._normal)
        # by any entry that no merge makes the reference would not spell a text either
        made = {model["vocab"].get(entry) for entry in made_by_merges(model)}
        ranks = {content: i for i, content in ordinary.items() if len(content) == 1 or i in made}
        self.fingerprint = self._fingerprint(normalizer, ordinary.keys() - ranks.values())
        # tiktoken must know every byte; those that the vocabulary lacks (rare control characters) get ids past its end
        lacking = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        ranks |= {byte: self.n_vocab + i for i, byte in enumerate(lacking)}
        # tiktoken looks for special tokens even where none is allowed, at half the speed if there are none to look for
        self._core = tiktoken.Encoding(
            name,
            pat_str=self._pattern or GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot_id},
        )

    def _fingerprint(self, normalizer: dict[str, Any] | None, never_made: set[int]) -> str:
        tokens = sha256_bytes(b"".join(len(content).to_bytes(4, "little") + content for content in self._bytes))
        decisive = {"tokens": tokens, "special": self.special_tokens, "added": self._added, "normalizer": normalizer}
        decisive["pattern"] = self._pattern or self._definition["pre_tokenizer"]
        if never_made:
            decisive["never_made"] = sorted(never_made)
        if self._cut_before.ids and self._cut_after.ids:
            decisive["before_normalizer"] = sorted(self._cut_before.ids.values())
        return sha256_json(decisive)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, dict[str, Any], str]]:
        # for another process: a copied reference would forget to read special spellings as plain text
        return Tokenizer, (self.name, self._definition, self._source)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens are never among them."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, uint32, in order."""
        return list(map(self._encode, texts))

    def _encode(self, text: str) -> np.ndarray:
        ids = self._joined(text, self._normal)
        if len(ids) and ids.max() >= self.n_vocab:
            # a byte without an id: the reference drops it, then merges its neighbours
            return np.array(self._reference_ids(text), np.uint32)
        return ids

    def _reference_ids(self, text: str) -> list[int]:
        return self.reference.encode(text, add_special_tokens=False).ids

    def _normal(self, text: str) -> str:
        return text if self._normalizer is None or text.isascii() else self._normalizer.normalize_str(text)

    def encode_as_it_is(self, text: str) -> np.ndarray:
        """Ids of `text` without the normalizer, uint32. A byte that the vocabulary lacks has one from n_vocab on."""
        return self._joined(text, str)

    def _joined(self, text: str, normal: Callable[[str], str]) -> np.ndarray:
        found = [
            np.array([piece], np.uint32) if isinstance(piece, int) else self._words(piece)
            for part in self._cut_before(text)
            for piece in ([part] if isinstance(part, int) else self._cut_after(normal(part)))
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint32), *found])

    def _words(self, text: str) -> np.ndarray:
        """Ids of a text without added tokens, cut by the pattern."""
        if self._pattern is not None:
            try:
                return self._core.encode_to_numpy(text, disallowed_special=())
            except (
                ValueError
            ):  # its engine keeps a state for each character of a long run of white space, up to a limit
                pass
        words = self.reference.pre_tokenizer.pre_tokenize_str(text)
        ids = [self.encode_piece(bytes(map(ALPHABET.__getitem__, word))) for word, _ in words]
        return np.array(list(chain.from_iterable(ids)), np.uint32)

    def encode_piece(self, content: bytes) -> list[int]:
        """Ids of any bytes merged as one word, without normalizer and pattern; from n_vocab on as above."""
        return self._core._encode_single_piece(content)

    def bytes_of(self, token: int) -> bytes:
        """Bytes of text behind an id: none for a special token, one for an id from n_vocab on."""
        return self._bytes[token] if token < self.n_vocab else self._core.decode_single_token_bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    @cached_property
    def reference(self) -> tokenizers.Tokenizer:
        """The `tokenizers` implementation of the same definition, reading special spellings as plain text too."""
        reference = tokenizers.Tokenizer.from_str(json.dumps(self._definition))
        reference.encode_special_tokens = True
        return reference

    def check(self, texts: Iterable[str]) -> None:
        """Compare with the reference. UserError names the first text whose ids differ."""
        for text in texts:
            ours, theirs = self.encode(text), self._reference_ids(text)
            if ours != theirs:
                at = next(i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b)
                raise UserError(
                    f"tokenizer {self.name}: its ids differ from the reference implementation's at token {at} "
                    f"of the text {text[:60]!r}; use another tokenizer"
                )

    def check_vocabulary(self) -> None:
        """Hold every entry against the reference: what merges make of its bytes, and the ids of added tokens.

        With this, `tokenizer_format.refuse_unmodelled` decides for every text. Merges are done in the order of ids, by
        which any two neighbours that together are an entry can be merged; the reference merges what its list names.
        Where two parts cover just an entry's bytes, every merge among them so far was one that its bytes alone would
        have seen, in the same order. So the two parts are those of the merge that makes the entry, if its bytes alone
        lead to it, and both do the same.

        Raises:
            UserError: an entry that a merge makes is not what its own bytes become, or an added token has another id.
        """
        model = self._definition["model"]
        merging = tokenizers.Tokenizer.from_str(
            json.dumps(self._definition | {"model": model | {"ignore_merges": False}})
        ).model
        mend = "use another tokenizer"
        for entry in set(made_by_merges(model)):
            if [token.id for token in merging.tokenize(entry)] != [model["vocab"][entry]]:
                raise UserError(f"{self._source}: its token {entry!r} is not what merges make of its bytes; {mend}")
        for content, token in (self.special_tokens | self._added).items():
            if (given := self.reference.token_to_id(content)) != token:
                told = f"its added token {content!r} is {token}, but the reference implementation gives it {given}"
                raise UserError(f"{self._source}: {told}; {mend}")

    def save(self, directory: Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` reads."""
        with atomic_file(directory / "tokenizer.json", "w") as file:
            # at once: json.dump encodes piece by piece in Python, in six times as long
            file.write(json.dumps(self._definition, ensure_ascii=False, separators=(",", ":")))
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "name_or_path": self.name,
            **special,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length or 10**30,  # transformers' own word for "no limit"
        }
        write_json(directory / "tokenizer_config.json", config)
        write_json(directory / "special_tokens_map.json", special)


def smollm2_tokenizer(gguf: Path) -> Tokenizer:
    """SmolLM2's tokenizer from the metadata of its GGUF file."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(gguf).fields
        names = ("tokens", "token_type", "merges", "pre")
        tokens, kinds, merges, pre = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{gguf}: not a GGUF file with a tokenizer ({error}); {packaged.FETCH_AGAIN}") from None
    if pre != "smollm":
        raise UserError(f"{gguf}: its pre-tokenizer is {pre!r}, expected 'smollm'; {packaged.FETCH_AGAIN}")
    control = 3  # llama.cpp's token type for special tokens
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == control}
    vocab = {token: i for i, token in enumerate(tokens)}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}
    return Tokenizer("smollm2", byte_level_definition(vocab, merges, special, pre_tokenizer), str(gguf))


def gpt2_tokenizer(encoder_json: Path, vocab_bpe: Path) -> Tokenizer:
    """GPT-2's tokenizer from the two files that OpenAI published."""
    try:
        vocab = json.loads(Path(encoder_json).read_text(encoding="utf-8"))
        merges = Path(vocab_bpe).read_text(encoding="utf-8").split("\n")[1:-1]  # the first line is a version
        special = {END_OF_TEXT: vocab[END_OF_TEXT]}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{encoder_json}: not GPT-2's tokenizer ({error}); {packaged.FETCH_AGAIN}") from None
    return Tokenizer("gpt2", byte_level_definition(vocab, merges, special, BYTE_LEVEL), str(encoder_json))


def json_tokenizer(tokenizer_json: Path, name: str | None = None, known: bool = False) -> Tokenizer:
    """A tokenizer from a Hugging Face tokenizer.json. UserError if it is not a byte-level BPE that MicroLM can run.

    Args:
        known: that it is one was found before; half a second or more is saved.
    """
    try:
        definition = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
        kind = definition["model"]["type"]
    except FileNotFoundError:
        raise UserError(f"{tokenizer_json} is not there ({seen_from()}); name the path of a tokenizer.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{tokenizer_json}: not a Hugging Face tokenizer.json ({error!r})") from None
    if kind != "BPE":
        raise UserError(f"{tokenizer_json}: its model is {kind}, MicroLM runs byte-level BPE; use another tokenizer")
    if definition["model"].get("byte_fallback"):
        raise UserError(
            f"{tokenizer_json}: is SentencePiece's, which a teacher may have and a corpus not; use a byte-level BPE"
        )
    # a template would put tokens around each text; here the end-of-text token alone does that, once for each document
    definition |= {"post_processor": BYTE_LEVEL, "decoder": BYTE_LEVEL, "truncation": None, "padding": None}
    built = Tokenizer(name or str(tokenizer_json), definition, str(tokenizer_json))
    if not known:
        built.check_vocabulary()
    return built


def build_tokenizer(spec: str, parts: Path = packaged.PARTS_DIRECTORY) -> Tokenizer:
    """Tokenizer for the `corpus.tokenizer` of params.yaml: smollm2, gpt2, olmo or the path of a tokenizer.json."""
    if spec == "smollm2":
        return smollm2_tokenizer(packaged.part_file(packaged.SMOLLM2, packaged.SMOLLM2_GGUF, parts))
    if spec == "gpt2":
        members = (packaged.GPT2_ENCODER, packaged.GPT2_MERGES)
        return gpt2_tokenizer(*(packaged.part_file(packaged.GPT2_TOKENIZER, member, parts) for member in members))
    if spec == "olmo":
        return json_tokenizer(
            packaged.part_file(packaged.EVALUATION, packaged.OLMO_TOKENIZER, parts), "olmo", known=True
        )
    return json_tokenizer(Path(spec))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote: the same ids and fingerprint."""
    config, mend = Path(directory) / "tokenizer_config.json", "make it again with: dvc repro -f -s tokenize"
    check_sums(config.parent, ("tokenizer.json", config.name), mend)
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("name_or_path")
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: not readable ({error}); {mend}") from None
    return json_tokenizer(config.parent / "tokenizer.json", name, known=True)
