"""Byte-level BPE, run by tiktoken, checked against the Hugging Face `tokenizers` implementation.

Whatever a tokenizer is built from (GGUF metadata, GPT-2's two files, a tokenizer.json), it first becomes the dictionary
that a tokenizer.json holds; ids, pattern and the reference implementation all follow from that one definition.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the reference is used on few texts; its pool outlives forks

import numpy as np
import tiktoken
import tokenizers

from microlm.corpus import parts as packaged
from microlm.errors import UserError
from microlm.files import atomic_file, check_sums, sha256_bytes, sha256_json, write_json

END_OF_TEXT = "<|endoftext|>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}

# What ByteLevel's regular expression matches, written so that tiktoken is fast: the alternatives without a look-ahead
# stand in one group, which its engine compiles as a whole. A run of spaces leaves its last one to the next word.
GPT2_PATTERN = r"""(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"""
# The same after Digits(individual_digits=True), which cuts the text around every digit first: a digit stands alone, and
# a run of spaces before it stays whole. Digits knows the digits of Unicode 17, regular expressions those of Unicode 16.
DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_PATTERN = rf"""(?: ?\p{{L}}+|'(?:[sdmt]|ll|ve|re)|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+)|\s+(?![^\s{DIGIT}])|\s"""

# GPT-2's printable character for each byte, as {character: byte} (openai/gpt-2, encoder.py, bytes_to_unicode)
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

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


class Tokenizer:
    """A byte-level BPE tokenizer; the spelling of a special token in a text is plain text.

    Attributes:
        n_vocab: number of ids, without padding.
        eot_id: id of the end-of-text token, which stands before every document.
        special_tokens: {spelling: id}.
        fingerprint: sha256 over what decides the ids: bytes of each, special and added tokens, pattern, normalizer.
        byte_lengths: int32 [n_vocab], bytes of text behind each id; 0 for special tokens.
    """

    def __init__(self, name: str, definition: dict[str, Any], source: str) -> None:
        """`definition` is the content of a tokenizer.json, `source` where it came from (for error messages)."""
        self.name = name
        self._definition, self._source = definition, source
        model = definition["model"]
        added = definition.get("added_tokens") or []
        self.special_tokens = {token["content"]: token["id"] for token in added if token["special"]}
        self._added = {token["content"]: token["id"] for token in added if not token["special"]}
        if END_OF_TEXT not in self.special_tokens:
            raise UserError(
                f"{source}: has no special token {END_OF_TEXT} to stand between documents; use another tokenizer"
            )
        self.eot_id = self.special_tokens[END_OF_TEXT]
        reserved = {token["id"] for token in added}
        ranks = _vocabulary_bytes(model["vocab"], reserved, source)
        self.n_vocab = 1 + max(chain(ranks.values(), reserved))
        self._bytes = [b""] * self.n_vocab
        for content, token in chain(ranks.items(), ((text.encode(), i) for text, i in self._added.items())):
            self._bytes[token] = content
        self.byte_lengths = np.array([len(content) for content in self._bytes], np.int32)
        pattern, normalizer = _cutting_pattern(definition.get("pre_tokenizer"), source), definition.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            known = f"its normalizer {normalizer.get('type')} is not one that MicroLM knows (none, NFC)"
            raise UserError(f"{source}: {known}")
        self._normalizer = tokenizers.normalizers.NFC() if normalizer else None
        longest_first = map(re.escape, sorted(self._added, key=len, reverse=True))
        self._splitter = re.compile(f"({'|'.join(longest_first)})")
        # enough to tell that none is in a text: a run of 24 spaces is not there where a run of 2 is not
        self._shortest_added = [a for a in self._added if not any(b in a for b in self._added if b != a)]
        tokens = sha256_bytes(b"".join(len(content).to_bytes(4, "little") + content for content in self._bytes))
        decisive = {"tokens": tokens, "special": self.special_tokens, "added": self._added, "pattern": pattern}
        self.fingerprint = sha256_json(decisive | {"normalizer": normalizer})
        # tiktoken must know every byte; those that the vocabulary lacks (rare control characters) get ids past its end
        lacking = [bytes([byte]) for byte in range(256) if bytes([byte]) not in ranks]
        ranks |= {byte: self.n_vocab + i for i, byte in enumerate(lacking)}
        # tiktoken looks for special tokens even where none is allowed, at half the speed if there are none to look for
        self._core = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot_id}
        )

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
        normal = not self._normalizer or text.isascii()
        ids = self.encode_as_it_is(text if normal else self._normalizer.normalize_str(text))
        if len(ids) and ids.max() >= self.n_vocab:
            # a byte without an id: the reference drops it, then merges its neighbours
            return np.array(self._reference_ids(text), np.uint32)
        return ids

    def _reference_ids(self, text: str) -> list[int]:
        return self.reference.encode(text, add_special_tokens=False).ids

    def encode_as_it_is(self, text: str) -> np.ndarray:
        """Ids of `text` without the normalizer, uint32. A byte that the vocabulary lacks has one from n_vocab on."""
        if not any(token in text for token in self._shortest_added):
            return self._core.encode_to_numpy(text, disallowed_special=())
        # added tokens that are not special cut the text before the pattern sees it, the longest first
        return np.concatenate(
            [
                np.array([self._added[piece]], np.uint32)
                if piece in self._added
                else self._core.encode_to_numpy(piece, disallowed_special=())
                for piece in filter(None, self._splitter.split(text))
            ]
        )

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


def _vocabulary_bytes(vocab: dict[str, int], reserved: set[int], source: str) -> dict[bytes, int]:
    """{bytes: id} of the ordinary tokens. tiktoken merges by id, so ids must be in the order of the merges."""
    try:
        return {bytes(ALPHABET[c] for c in text): i for text, i in vocab.items() if i not in reserved}
    except KeyError as error:
        raise UserError(
            f"{source}: not a byte-level BPE, it has a token with the character {error}; use another tokenizer"
        ) from None


def _cutting_pattern(pre_tokenizer: dict[str, Any] | None, source: str) -> str:
    """The regular expression that cuts a text as `pre_tokenizer` does."""
    *before, last = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        match last.get("use_regex", True), before:
            case True, []:
                return GPT2_PATTERN
            case True, [digits] if digits == DIGITS:
                return DIGITS_PATTERN
            case False, [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}]:
                return pattern
    raise UserError(
        f"{source}: its pre_tokenizer is not one that MicroLM knows (ByteLevel, Digits + ByteLevel, Split + ByteLevel)"
    )


def byte_level_definition(
    vocab: dict[str, int], merges: list[str], special: dict[str, int], pre_tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags} for text, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in merges]},
    }


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


def json_tokenizer(tokenizer_json: Path, name: str | None = None) -> Tokenizer:
    """A tokenizer from a Hugging Face tokenizer.json. UserError if it is not a byte-level BPE that MicroLM can run."""
    try:
        definition = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
        kind = definition["model"]["type"]
    except FileNotFoundError:
        raise UserError(f"{tokenizer_json} is not there; name the path of a tokenizer.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{tokenizer_json}: not a Hugging Face tokenizer.json ({error!r})") from None
    if kind != "BPE":
        raise UserError(f"{tokenizer_json}: its model is {kind}, MicroLM runs byte-level BPE; use another tokenizer")
    # a template would put tokens around each text; here the end-of-text token alone does that, once for each document
    definition |= {"post_processor": BYTE_LEVEL, "truncation": None, "padding": None}
    return Tokenizer(name or str(tokenizer_json), definition, str(tokenizer_json))


def build_tokenizer(spec: str, parts: Path = packaged.PARTS_DIRECTORY) -> Tokenizer:
    """Tokenizer for the `corpus.tokenizer` of params.yaml: smollm2, gpt2, olmo or the path of a tokenizer.json."""
    if spec == "smollm2":
        return smollm2_tokenizer(packaged.part_file(packaged.SMOLLM2, packaged.SMOLLM2_GGUF, parts))
    if spec == "gpt2":
        members = (packaged.GPT2_ENCODER, packaged.GPT2_MERGES)
        return gpt2_tokenizer(*(packaged.part_file(packaged.GPT2_TOKENIZER, member, parts) for member in members))
    if spec == "olmo":
        return json_tokenizer(packaged.part_file(packaged.EVALUATION, packaged.OLMO_TOKENIZER, parts), "olmo")
    return json_tokenizer(Path(spec))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote: the same ids and fingerprint."""
    config, mend = Path(directory) / "tokenizer_config.json", "make it again with: dvc repro -f -s tokenize"
    check_sums(config.parent, ("tokenizer.json", config.name), mend)
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("name_or_path")
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: not readable ({error}); {mend}") from None
    return json_tokenizer(config.parent / "tokenizer.json", name)
