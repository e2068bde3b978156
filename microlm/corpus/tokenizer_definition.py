"""What a tokenizer.json says, as far as a byte-level BPE needs it: vocabulary as bytes, pattern that cuts a text."""

from typing import Any

import tokenizers

from microlm.errors import UserError

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


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, as {character: byte} (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


def vocabulary_bytes(vocab: dict[str, int], reserved: set[int], source: str) -> dict[bytes, int]:
    """{bytes: id} of the ordinary tokens. tiktoken merges by id, so ids must be in the order of the merges."""
    try:
        return {bytes(ALPHABET[c] for c in text): i for text, i in vocab.items() if i not in reserved}
    except KeyError as error:
        raise UserError(
            f"{source}: not a byte-level BPE, it has a token with the character {error}; use another tokenizer"
        ) from None


def cutting_pattern(pre_tokenizer: dict[str, Any] | None, source: str) -> str:
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


def text_normalizer(normalizer: dict[str, Any] | None, source: str) -> tokenizers.normalizers.Normalizer | None:
    if normalizer is None:
        return None
    if normalizer == {"type": "NFC"}:
        return tokenizers.normalizers.NFC()
    raise UserError(f"{source}: its normalizer {normalizer.get('type')} is not one that MicroLM knows (none, NFC)")


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
