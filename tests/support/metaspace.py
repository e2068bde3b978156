"""SentencePiece-like tokenizers, trained here in a blink, and what they should do, written out plainly."""

import copy
import json
import re
from functools import cache
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from microlm.corpus.metaspace import MetaspaceTokenizer
from microlm.corpus.metaspace_format import GEMMA_SPLIT, SPACE, TO_METASPACE

SPECIALS = ("<unk>", "<s>", "</s>")
KINDS = ("gemma", "llama", "metaspace")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
TEXTS = [
    "The wall is long, naïve and 2019 years old. The plant is a living thing; the other plants are not.",
    "In 1901 the old wall fell.\n\nIt was a long time ago, and the people of the town are still telling of it.",
    "x = [1, 2, 3]\n    return x  # so that  runs of   spaces are merged   too",
]


@cache
def definition(kind: str) -> str:
    """The content of a tokenizer.json, as JSON. All put <s> before a text but `metaspace`.

    `gemma`: spaces are written, nothing is put before a text; three line feeds and two spaces are tokens of their own.
    `llama`: a space before each text. `metaspace`: the same by a pre-tokenizer, which cuts words too.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        prepend = [normalizers.Prepend(SPACE)] if kind == "llama" else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIALS, *names], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] in SPECIALS]
    if kind == "gemma":
        more = {"\n\n\n": len(made["model"]["vocab"]), "  ": len(made["model"]["vocab"]) + 1}
        made["model"]["vocab"] |= more
        made["added_tokens"] += [{"id": i, "content": text, **FLAGS} for text, i in more.items()]
        made |= {"normalizer": TO_METASPACE, "pre_tokenizer": GEMMA_SPLIT}
    if kind != "metaspace":
        text = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": text,
            "pair": [*text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    return json.dumps(made)


def fresh_definition(kind: str) -> dict[str, Any]:
    """To be changed."""
    return copy.deepcopy(json.loads(definition(kind)))


@cache
def metaspace_tokenizer(kind: str) -> MetaspaceTokenizer:
    return MetaspaceTokenizer(kind, fresh_definition(kind), f"{kind}.json")


def merged(definition: dict[str, Any], text: str) -> list[int]:
    """Ids of a text as it is, by looking for the next merge in the whole word each time."""
    vocab, found = definition["model"]["vocab"], []
    ranks = {tuple(merge): rank for rank, merge in enumerate(definition["model"]["merges"])}
    whole = {token["content"]: token["id"] for token in definition["added_tokens"] if not token["special"]}
    pattern = "|".join(map(re.escape, sorted(whole, key=len, reverse=True))) or "(?!)"
    for part in re.split(f"({SPACE})", text):
        if part == SPACE:
            found += [vocab[f"<0x{byte:02X}>"] for byte in SPACE.encode()]
            continue
        for piece in re.split(f"({pattern})", part):
            if piece in whole:
                found.append(whole[piece])
                continue
            written = piece.replace(" ", SPACE)
            cut = (definition["pre_tokenizer"] or {}).get("type") == "Metaspace"
            for word in re.split(f"(?={SPACE})", written) if cut else [written]:
                found += _merge(word, vocab, ranks)
    return found


def _merge(word: str, vocab: dict[str, int], ranks: dict[tuple[str, ...], int]) -> list[int]:
    symbols = list(word)
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    names = [[s] if s in vocab else [f"<0x{byte:02X}>" for byte in s.encode()] for s in symbols]
    return [vocab[name] for several in names for name in several]
