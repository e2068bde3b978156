"""Which tokenizer.json files are run here, decided by reading one: every field of it is obeyed, replaced, or refused.

truncation, padding,    replaced: none, and byte-level. They put tokens around a text or spell ids as text, where
post_processor, decoder an end-of-text token before each document and the bytes of each id do
normalizer              none or NFC
pre_tokenizer           what cuts a text without losing any of it: Split and Punctuation (isolated), Digits, then
                        ByteLevel; three of these are known as a regular expression, the others are asked
added_tokens            special ones are never found in a text; others are, the longest first, those with
                        `normalized` after the normalizer. lstrip, rstrip and single_word of these are refused: they
                        take white space that no id would stand for. Ids have to be those that the reference gives
model                   BPE over bytes, whose merges are in the order of the ids that they make. ignore_merges as it
                        is where every entry is what merges make of it. dropout, byte_fallback and marks of
                        subwords are refused. unk_token and fuse_unk concern bytes without an id, see `Tokenizer`
vocab entries that      never made, nor by the reference
no merge makes
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from microlm.errors import UserError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}

# What ByteLevel's regular expression matches, written so that tiktoken is fast: the alternatives without a look-ahead
# stand in one group, which its engine compiles as a whole. A run of spaces leaves its last one to the next word.
GPT2_PATTERN = r"""(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s"""
# The same after Digits(individual_digits=True), which cuts the text around every digit first: a digit stands alone, and
# a run of spaces before it stays whole. Digits knows the digits of Unicode 17, regular expressions those of Unicode 16.
DIGIT = r"\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}"
DIGITS_PATTERN = rf"""(?: ?\p{{L}}+|'(?:[sdmt]|ll|ve|re)|[{DIGIT}]| ?[^\s\p{{L}}{DIGIT}]+)|\s+(?![^\s{DIGIT}])|\s"""

# Of Llama 3, Qwen 2 and GPT-4o, which tiktoken's engine and the reference's match alike. In other patterns they may
# differ (case folding, classes, Unicode's version), so that the reference cuts the text itself.
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{a}{_LOWER}{b}{_SUFFIX}?" for a, b in ("*+", "+*"))
_O200K = "|".join(_WORDS) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN_PATTERNS = (_CL100K % "{1,3}", _CL100K % "", _O200K)

# GPT-2's printable character for each byte, as {character: byte} (openai/gpt-2, encoder.py, bytes_to_unicode)
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

# options of a BPE and the values under which the reference does what is done here
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0.0),
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
_TAKES_SPACE = ("lstrip", "rstrip", "single_word")


def refuse_unmodelled(definition: dict[str, Any], source: str) -> None:
    """UserError, in one line that begins with `source`, for the first setting that would not be obeyed."""
    for told in _unmodelled(definition):
        raise UserError(f"{source}: {told}; use another tokenizer")


def _unmodelled(definition: dict[str, Any]) -> Iterator[str]:
    normalizer, model = definition.get("normalizer"), definition["model"]
    if normalizer not in (None, {"type": "NFC"}):
        yield f"its normalizer {normalizer.get('type')} is not one that MicroLM knows (none, NFC)"
    if not _loses_nothing(definition.get("pre_tokenizer")):
        known = "Split and Punctuation that isolate, Digits, then ByteLevel without add_prefix_space"
        yield f"its pre_tokenizer is not one that MicroLM knows ({known})"
    for name, harmless in _OPTIONS.items():
        if model.get(name) not in harmless:
            yield f"its model has {name}={model[name]!r}, which MicroLM does not do"
    results, vocab = made_by_merges(model), model["vocab"]
    for before, after in pairwise(results):
        if vocab.get(before, -1) > vocab.get(after, -1):
            yield f"its merges are not in the order of their ids ({before!r} before {after!r})"
            break
    made, seen = set(results), set()
    added = {token["content"] for token in definition.get("added_tokens") or []}
    if model.get("ignore_merges") and (whole := next((e for e in vocab.keys() - made - added if len(e) > 1), None)):
        yield f"its token {whole!r} is made by no merge, and by ignore_merges it would stand for a whole word"
    if len(set(vocab.values())) < len(vocab):
        yield "two entries of its vocabulary have the same id"
    for token in definition.get("added_tokens") or []:
        content, taking = token["content"], next((flag for flag in _TAKES_SPACE if token.get(flag)), None)
        if content in seen:
            yield f"its added token {content!r} is there twice"
        seen.add(content)
        if token["special"]:
            if content in made or (len(content) == 1 and content in vocab):
                yield f"its special token {content!r} is also made of ordinary text"
        elif taking:
            yield f"its added token {content!r} has {taking}, which would take text that no id stands for"
        elif not content:
            yield "it has an added token without a spelling"


def made_by_merges(model: dict[str, Any]) -> list[str]:
    """The vocabulary entry that each merge makes, in their order."""
    return ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def vocabulary_bytes(model: dict[str, Any], reserved: set[int], source: str) -> dict[int, bytes]:
    """{id: bytes} of the ordinary entries. UserError where one is not spelled in the alphabet of bytes."""
    try:
        return {i: bytes(ALPHABET[c] for c in text) for text, i in model["vocab"].items() if i not in reserved}
    except KeyError as error:
        raise UserError(
            f"{source}: not a byte-level BPE, it has a token with the character {error}; use another tokenizer"
        ) from None


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if (pre_tokenizer or {}).get("type") == "Sequence":
        return pre_tokenizer["pretokenizers"]
    return [pre_tokenizer or {}]


def _loses_nothing(pre_tokenizer: dict[str, Any] | None) -> bool:
    *before, last = _steps(pre_tokenizer) or [{}]
    isolating = all(
        step.get("type") == "Digits"
        or (step.get("type") == "Punctuation" and step.get("behavior", "Isolated") == "Isolated")
        or (step.get("type") == "Split" and step["behavior"] == "Isolated" and not step["invert"])
        for step in before
    )
    return isolating and last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)


def cutting_pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The regular expression that cuts a text as `pre_tokenizer` does; None where the reference has to be asked."""
    match _steps(pre_tokenizer):
        case [{"type": "ByteLevel"} as last] if last.get("use_regex", True):
            return GPT2_PATTERN
        case [digits, {"type": "ByteLevel"} as last] if digits == DIGITS and last.get("use_regex", True):
            return DIGITS_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel", "use_regex": False}]:
            return pattern if pattern in KNOWN_PATTERNS else None
    return None


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
