"""Which definitions of a SentencePiece BPE are read here, decided by reading one; and one made of a model's scores.

Every field of the format is obeyed, replaced, or refused:

truncation, padding,  replaced: none. A template tells the begin-of-text token; what it puts behind a text is left out
post_processor        (a teacher never sees the end of a text)
decoder               replaced by the bytes of each id
normalizer            Replace of a space by U+2581, after a Prepend of U+2581 or not: others change the bytes
pre_tokenizer         none, Metaspace, or Gemma's Split at spaces, which finds none
added_tokens          special ones are never found in a text, others are; lstrip, rstrip and single_word are refused
model                 BPE with byte_fallback and an id for each byte, so that nothing is unknown. dropout, ignore_merges
                      and marks of subwords are refused, and merges that make a special token or the name of a byte
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from microlm.corpus.tokenizer import END_OF_TEXT
from microlm.corpus.tokenizer_format import made_by_merges

SPACE = "\u2581"
ENDS = (END_OF_TEXT, "<eos>", "</s>", "<|end_of_text|>")  # spellings of the end of a text, the first that is there
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
TO_METASPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
GEMMA_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
# llama.cpp's token types
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def piece_bytes(piece: str) -> bytes:
    """What an ordinary piece stands for."""
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def ids_of_bytes(vocab: dict[str, int]) -> dict[int, int]:
    """{byte: id}. The first Gemmas have a tab in the place of its byte."""
    characters = {ord(piece): token for piece, token in vocab.items() if len(piece) == 1 and piece.isascii()}
    return characters | {int(byte[1], 16): token for piece, token in vocab.items() if (byte := BYTE.fullmatch(piece))}


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if (normalizer or {}).get("type") == "Sequence":
        return normalizer["normalizers"]
    return [normalizer] if normalizer else []


def as_it_is(definition: dict[str, Any]) -> dict[str, Any]:
    """What of a definition puts a space before a text, without that."""
    steps = [step for step in _steps(definition.get("normalizer")) if step["type"] != "Prepend"]
    cut = definition.get("pre_tokenizer")
    if cut and cut["type"] == "Metaspace":
        cut = cut | {"prepend_scheme": "never"}
        cut.pop("add_prefix_space", None)
    return {"normalizer": steps[0] if steps else None, "pre_tokenizer": cut, "truncation": None, "padding": None}


def begin_ids(post_processor: dict[str, Any] | None) -> tuple[int, ...]:
    """Ids that a template puts before its text."""
    steps = (post_processor or {}).get("processors") or [post_processor or {}]
    template = next((step for step in steps if step.get("type") == "TemplateProcessing"), None)
    if template is None:
        return ()
    ids: list[int] = []
    for step in template["single"]:
        if "Sequence" in step:
            break
        ids += template["special_tokens"][step["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def unmodelled(definition: dict[str, Any]) -> Iterator[str]:
    """What would not be obeyed, as the end of a sentence about the file."""
    model, vocab = definition["model"], definition["model"].get("vocab") or {}
    if model["type"] != "BPE":
        yield f"its model is {model['type']}, and of SentencePiece's models only BPE is read"
    steps, cut = _steps(definition.get("normalizer")), definition.get("pre_tokenizer") or {}
    prepends = steps[:1] == [{"type": "Prepend", "prepend": SPACE}]
    odd = next((step for step in steps[prepends:] if step != TO_METASPACE), None)
    if odd or len(steps) > 1 + prepends:
        known = "Prepend, then Replace of a space"
        yield f"its normalizer {(odd or steps[-1]).get('type')} is not one that MicroLM knows ({known})"
    if cut and cut != GEMMA_SPLIT and (cut.get("type"), cut.get("replacement")) != ("Metaspace", SPACE):
        yield f"its pre_tokenizer {cut.get('type')} is not one that MicroLM knows (Metaspace, none)"
    if cut.get("type") != "Metaspace" and TO_METASPACE not in steps:
        yield f"nothing in it writes a space as {SPACE}"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            yield f"its model has {name}={model[name]!r}, which MicroLM does not do"
    if lacking := sorted(set(range(256)) - ids_of_bytes(vocab).keys()):
        yield f"its model has no token for the byte <0x{lacking[0]:02X}>"
    if not model.get("byte_fallback"):
        yield "its model has no byte_fallback, and loses what it does not know"
    if len(set(vocab.values())) < len(vocab):
        yield "two entries of its vocabulary have the same id"
    yield from _unmodelled_added(definition.get("added_tokens") or [], set(made_by_merges(model)))


def _unmodelled_added(added: list[dict[str, Any]], made: set[str]) -> Iterator[str]:
    for token in added:
        content, taking = token["content"], ("lstrip", "rstrip", "single_word")
        if token["special"]:
            if content in made or len(content) < 2:
                yield f"its special token {content!r} is also made of ordinary text"
        elif flag := next((flag for flag in taking if token.get(flag)), None):
            yield f"its added token {content!r} has {flag}, which would take text that no id stands for"
        elif not content:
            yield "it has an added token without a spelling"
    if byte := next((piece for piece in made if BYTE.fullmatch(piece)), None):
        yield f"its token {byte} for a byte is also made of ordinary text"
    if not any(token["special"] and token["content"] in ENDS for token in added):
        yield f"has no special token {', '.join(ENDS[:-1])} or {ENDS[-1]} to end a text with"


def is_metaspace(definition: Any) -> bool:
    """Whether the content of a tokenizer.json is, or would be, a SentencePiece model's: it knows U+2581, or bytes."""
    try:
        parts = (definition.get("normalizer"), definition.get("pre_tokenizer"), definition.get("decoder"))
        model = definition["model"]
        return SPACE in json.dumps(parts, ensure_ascii=False) or bool(model.get("byte_fallback"))
    except (AttributeError, KeyError, TypeError):
        return False


def metaspace_definition(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], begin: int | None, unknown: int
) -> dict[str, Any]:
    """The content of a tokenizer.json for a SentencePiece BPE without a space before the text.

    Two neighbours that together are a piece can be merged, that of the highest score first (Kudo and Richardson 2018,
    "SentencePiece", arXiv:1808.06226, section 3.1). User-defined pieces are looked for before anything is merged.

    Args:
        pieces: spellings by id; user-defined ones hold spaces.
        scores: of the ordinary ones.
        kinds: llama.cpp's types.
        begin: id of the token before every text.
        unknown: id of the token that byte fallback leaves without a use.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": piece, **flags, "special": kind == CONTROL}
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    ordinary = {piece: -scores[i] for i, (piece, kind) in enumerate(zip(pieces, kinds)) if kind == NORMAL}
    vocab = {piece: i for i, piece in enumerate(pieces)}
    single = {"Sequence": {"id": "A", "type_id": 0}}
    template: list[dict[str, Any]] = [single]
    special = {}
    if begin is not None:
        spelled = pieces[begin]
        template = [{"SpecialToken": {"id": spelled, "type_id": 0}}, single]
        special = {spelled: {"id": spelled, "ids": [begin], "tokens": [spelled]}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": TO_METASPACE,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": pieces[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": list(_merges(ordinary)),
        },
    }


def _merges(cost: dict[str, float]) -> Iterable[tuple[str, str]]:
    """Every two entries that together are a third, the third of the lowest cost first."""
    for piece in sorted(cost, key=cost.__getitem__):
        for cut in range(1, len(piece)):
            if piece[:cut] in cost and piece[cut:] in cost:
                yield piece[:cut], piece[cut:]
