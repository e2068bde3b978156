"""Promises of the tokenizers: the reference implementation's ids, on any text, before and after saving."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from microlm.corpus.tokenizer import (
    AWKWARD_TEXTS,
    END_OF_TEXT,
    Tokenizer,
    build_tokenizer,
    id_count,
    json_tokenizer,
    load_tokenizer,
    smollm2_tokenizer,
)
from microlm.corpus.tokenizer_format import BYTE_LEVEL, DIGITS, KNOWN_PATTERNS
from microlm.errors import UserError
from tests.support.clones import FIXTURES

NAMES = ("smollm2", "gpt2", "olmo")
FIXTURE = FIXTURES / "documents.jsonl"

# Texts where pre-tokenizers disagree: runs of spaces, digits, contractions, added and special tokens, any character.
WHITESPACE = st.sampled_from(["  ", "   ", " " * 24, " " * 25, "\n", "\t", "\r\n", "\u00a0"])
WORDS = st.sampled_from(["1", " 42", "½", "'s", "'LL", "''", "the", " The", "ing", "!", "...", "日本", "👩\u200d👧"])
RARE = st.sampled_from(["\x04", "\U0006d000", "n\u0303", "\u1100\u1161"])  # without an id; not in normal form
TOKENS = st.sampled_from(["<|endoftext|>", "<|im_start|>", "<|padding|>", "|||IP_ADDRESS|||", "|||"])
FRAGMENTS = WHITESPACE | WORDS | RARE | TOKENS
TEXTS = st.lists(FRAGMENTS | st.text(max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module")
def built(parts: Path) -> dict[str, Tokenizer]:
    return {name: build_tokenizer(name, parts) for name in NAMES}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [json.loads(line)["text"] for line in FIXTURE.read_text(encoding="utf-8").splitlines()]


def reference_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_ids_are_the_reference_implementations_on_any_text(built: dict[str, Tokenizer], name: str, text: str) -> None:
    assert built[name].encode(text) == reference_ids(built[name], text)


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_every_assigned_character_are_the_references(built: dict[str, Tokenizer], name: str) -> None:
    for start in range(0, 0x30000, 64):
        characters = [chr(c) for c in range(start, start + 64) if not 0xD800 <= c < 0xE000]
        built[name].check([" 1a".join(characters), "".join(characters), "  ".join(characters)])


@pytest.mark.parametrize("name", NAMES)
def test_the_saved_directory_gives_transformers_the_same_ids(
    built: dict[str, Tokenizer], name: str, tmp_path: Path, documents: list[str]
) -> None:
    tokenizer = built[name]
    tokenizer.save(tmp_path, model_max_length=1024)
    # beside a model's config.json, transformers could rebuild the tokenizer by the model's class
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*AWKWARD_TEXTS, *documents):
        assert saved(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
        assert END_OF_TEXT in text or saved.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert saved.eos_token_id == saved.bos_token_id == saved.pad_token_id == tokenizer.eot_id
    assert saved.model_max_length == 1024
    assert saved(END_OF_TEXT)["input_ids"] == [tokenizer.eot_id]


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_tokenizer_loads_as_the_same_one(built: dict[str, Tokenizer], name: str, tmp_path: Path) -> None:
    built[name].save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for attribute in ("name", "n_vocab", "eot_id", "fingerprint"):
        assert getattr(loaded, attribute) == getattr(built[name], attribute)
    assert np.array_equal(loaded.byte_lengths, built[name].byte_lengths)
    loaded.check(AWKWARD_TEXTS)


def test_fingerprints_tell_tokenizers_apart(built: dict[str, Tokenizer], tmp_path: Path) -> None:
    assert len({tokenizer.fingerprint for tokenizer in built.values()}) == len(NAMES)
    built["smollm2"].save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    saved["pre_tokenizer"] = saved["pre_tokenizer"]["pretokenizers"][1]  # drops the digits rule, leaves the vocabulary
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint != built["smollm2"].fingerprint


def test_known_ids(built: dict[str, Tokenizer]) -> None:
    assert built["gpt2"].encode("Hello world") == [15496, 995]
    assert built["smollm2"].encode("Hello world") == [19556, 905]
    assert [(t.n_vocab, t.eot_id) for t in built.values()] == [(49152, 0), (50257, 50256), (50280, 50279)]


def test_smollm2_cuts_every_digit_and_keeps_spaces_before_it_whole(built: dict[str, Tokenizer]) -> None:
    pieces = [built["smollm2"].decode([i]) for i in built["smollm2"].encode("  42 x²")]
    assert pieces == ["  ", "4", "2", " x", "²"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_decoding_gives_the_text_back_and_byte_lengths_count_it(
    built: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = built[name]
    if any(character in text for character in "\x04\x06\x13\x14\x16\x1d") or any(
        "\U00040000" <= c < "\U000c0000" for c in text
    ):
        return  # smollm2 has no id for these
    if name == "olmo":
        text = tokenizers.normalizers.NFC().normalize_str(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[np.array(ids, int)].sum() == len(text.encode())


def test_special_spellings_in_a_text_are_plain_text(built: dict[str, Tokenizer]) -> None:
    for tokenizer in built.values():
        ids = tokenizer.encode(f"a{END_OF_TEXT}b<|im_start|>")
        assert tokenizer.eot_id not in ids
        assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b<|im_start|>"
        assert tokenizer.byte_lengths[tokenizer.eot_id] == 0


def test_texts_at_once_get_the_ids_that_each_gets_alone(built: dict[str, Tokenizer], documents: list[str]) -> None:
    for texts in (documents, documents[:1], []):
        at_once = built["smollm2"].encode_batch(texts)
        assert [ids.tolist() for ids in at_once] == [built["smollm2"].encode(text) for text in texts]


def trained_json(path: Path, **changes: object) -> Path:
    """A small tokenizer.json of the kind that newer models have: a Split pattern, a template that adds a token."""
    trained = tokenizers.Tokenizer(models.BPE())
    pattern = tokenizers.Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["the cat sat on the mat 123 times, then the other cat sat"] * 10, trainer)
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    path.write_text(json.dumps(json.loads(trained.to_str()) | changes), encoding="utf-8")
    return path


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_tokenizer_json_with_its_own_pattern_matches_the_reference(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "trained.json"
    tokenizer = json_tokenizer(path if path.exists() else trained_json(path))
    assert (
        tokenizer.encode(text) == tokenizers.Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids
        or "<|" in text
    )
    assert tokenizer.encode(text) == reference_ids(tokenizer, text)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer"),
        ({"added_tokens": []}, "no special token"),
        ({"model": {"type": "Unigram", "vocab": []}}, "its model is Unigram"),
        ({"model": {"type": "BPE", "vocab": {"▁the": 5}, "merges": []}}, "not a byte-level BPE"),
        ({"model": []}, "not a Hugging Face tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_run_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    path = trained_json(tmp_path / "other.json", **changes)
    with pytest.raises(UserError, match=complaint) as caught:
        json_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_absent_or_damaged_tokenizer_is_named(built: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json is not there"):
        build_tokenizer(str(tmp_path / "nowhere.json"), tmp_path)
    with pytest.raises(UserError, match="dvc repro fetch"):
        build_tokenizer("smollm2", tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match=r"broken\.gguf: not a GGUF file with a tokenizer"):
        smollm2_tokenizer(tmp_path / "broken.gguf")
    shutil.copytree(FIXTURE.parent, tmp_path / "saved")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not readable"):
        load_tokenizer(tmp_path / "saved")


def test_a_differing_tokenizer_is_found_and_the_text_named(built: dict[str, Tokenizer]) -> None:
    other = build_with_pattern(built["smollm2"])
    with pytest.raises(UserError, match="'I saw  42 swans'"):
        other.check(["I saw two swans", "I saw  42 swans"])


def build_with_pattern(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary without the digits rule, held against the reference that has it."""
    definition = json.loads(tokenizer.reference.to_str())
    definition["pre_tokenizer"] = definition["pre_tokenizer"]["pretokenizers"][1]
    other = Tokenizer("without-digits", definition, "test")
    other.reference = tokenizer.reference
    return other


# --- what people bring ------------------------------------------------------------------------------------------------


def test_a_limit_of_the_fast_path_is_none_of_the_definition(built: dict[str, Tokenizer]) -> None:
    for name in NAMES:
        for text in ("table" + " " * 1_000_000 + "end", " \t" * 300_000 + "7", "\u2003" * 200_000):
            assert built[name].encode(text) == reference_ids(built[name], text)


@pytest.fixture(scope="module")
def definition(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a small tokenizer that is understood in every field."""
    plain = json.loads(trained_json(tmp_path_factory.mktemp("plain") / "tokenizer.json").read_text(encoding="utf-8"))
    return plain | {"pre_tokenizer": BYTE_LEVEL}


def added(content: str, number: int, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **plain, **flags}


FLAGS = st.sampled_from(["single_word", "lstrip", "rstrip", "normalized", "special"])
CONTENTS = st.sampled_from(["<note>", "<note>s", "te>", "at", " the", "the cat", "e\u0301", "é", "<|end", "s>", "  "])
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BARE = BYTE_LEVEL | {"use_regex": False}
PRE_TOKENIZERS = [
    BYTE_LEVEL,
    BYTE_LEVEL | {"add_prefix_space": True},
    BARE,
    {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
    {"type": "Sequence", "pretokenizers": [DIGITS | {"individual_digits": False}, BYTE_LEVEL]},
    {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, DIGITS, BARE]},
    {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"String": "a"}}, BYTE_LEVEL]},
    {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": r"(?i:the)|\h+|\s"}}, BARE]},
    {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"String": "a"}, "behavior": "Removed"}, BYTE_LEVEL]},
    *(
        {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": pattern}}, BARE]}
        for pattern in KNOWN_PATTERNS
    ),
    {"type": "Whitespace"},
    None,
]
NORMALIZERS = [None, {"type": "NFC"}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Sequence", "normalizers": []}]
OPTIONS = [
    {},
    {"ignore_merges": True},
    {"dropout": 0.5},
    {"byte_fallback": True},
    {"unk_token": "a", "fuse_unk": True},
    {"continuing_subword_prefix": "##"},
    {"end_of_word_suffix": "</w>"},
]
SPELLED = st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "the", "The", " cat", "at", "7", "42", ".", "!s", "e", "\u0301", "é", "\u017f", "\x1c"]
    )
    | CONTENTS
    | st.just(END_OF_TEXT)
    | st.text(max_size=3),
    max_size=10,
).map("".join)


@settings(max_examples=300)
@given(data=st.data())
def test_every_field_of_a_tokenizer_json_is_obeyed_or_refused(
    definition: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    model = json.loads(json.dumps(definition["model"]))
    changed = definition | {"model": model, "added_tokens": list(definition["added_tokens"])}
    changes = data.draw(
        st.sets(st.sampled_from(["added", "normalizer", "pre", "options", "vocab", "merges"]), max_size=3)
    )
    if "added" in changes:
        for content in data.draw(st.lists(CONTENTS, min_size=1, max_size=3, unique=True)):
            flags = dict.fromkeys(data.draw(st.sets(FLAGS, max_size=2)), True)
            number = model["vocab"].get(content, len(model["vocab"]) + len(changed["added_tokens"]) - 1)
            changed["added_tokens"].append(added(content, number + data.draw(st.sampled_from([0, 0, 0, 1])), **flags))
    if "normalizer" in changes:
        changed["normalizer"] = data.draw(st.sampled_from(NORMALIZERS))
    if "pre" in changes:
        changed["pre_tokenizer"] = data.draw(st.sampled_from(PRE_TOKENIZERS))
    if "options" in changes:
        model |= data.draw(st.sampled_from(OPTIONS))
    if "vocab" in changes:  # an entry that no merge makes, perhaps before others
        model["vocab"][data.draw(st.sampled_from(["Ġtheca", "thethe", "atthe"]))] = len(model["vocab"])
    if "merges" in changes:
        at = data.draw(st.integers(0, len(model["merges"]) - 2))
        if data.draw(st.booleans()):
            model["merges"][at], model["merges"][at + 1] = model["merges"][at + 1], model["merges"][at]
        else:
            del model["merges"][at]
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    try:
        tokenizer = json_tokenizer(path)
    except UserError as refused:
        assert changes and str(refused).startswith(f"{path}: ") and "\n" not in str(refused)
        return
    event("obeyed: " + ", ".join(sorted(changes)))
    reference = tokenizers.Tokenizer.from_file(str(path))
    reference.encode_special_tokens = True
    for text in data.draw(st.lists(SPELLED, min_size=1, max_size=5)):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())


OBEYED = [
    {},
    {"normalizer": {"type": "NFC"}},
    *({"pre_tokenizer": PRE_TOKENIZERS[place]} for place in (3, 4, 5, 6, 7, 9, 10, 11)),
    {"added_tokens": [added(END_OF_TEXT, 0, special=True), added("<note>", 279), added("<no", 280, normalized=True)]},
    {"post_processor": None, "decoder": None, "truncation": {"max_length": 2}, "padding": None},
]


@pytest.mark.parametrize("changes", OBEYED)
def test_what_is_modelled_is_not_refused(definition: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    assert len(definition["model"]["vocab"]) == 279  # where ids of added tokens begin
    (tmp_path / "a.json").write_text(json.dumps(definition | changes), encoding="utf-8")
    json_tokenizer(tmp_path / "a.json").check([*AWKWARD_TEXTS, "see <note> here, <no"])


@pytest.mark.parametrize("name", range(len(KNOWN_PATTERNS)))
def test_known_patterns_match_alike_around_every_assigned_character(
    definition: dict[str, Any], tmp_path: Path, name: int
) -> None:
    step = SPLIT | {"pattern": {"Regex": KNOWN_PATTERNS[name]}}
    cut = definition | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, BARE]}}
    (tmp_path / "a.json").write_text(json.dumps(cut), encoding="utf-8")
    tokenizer = json_tokenizer(tmp_path / "a.json")
    for start in range(0, 0x30000, 64):
        characters = [chr(c) for c in range(start, start + 64) if not 0xD800 <= c < 0xE000]
        tokenizer.check(["'".join(characters), "".join(characters), "  a".join(characters), "\n1".join(characters)])


def test_ids_with_gaps_are_counted_by_the_largest(definition: dict[str, Any], tmp_path: Path) -> None:
    model, moved = json.loads(json.dumps(definition["model"])), 1550
    model["vocab"][END_OF_TEXT] = moved
    gap = definition | {"model": model, "added_tokens": [added(END_OF_TEXT, moved, special=True)]}
    (tmp_path / "a.json").write_text(json.dumps(gap), encoding="utf-8")
    tokenizer = json_tokenizer(tmp_path / "a.json")
    assert (tokenizer.n_vocab, tokenizer.eot_id) == (moved + 1, moved)
    tokenizer.save(tmp_path)
    assert id_count(AutoTokenizer.from_pretrained(tmp_path).get_vocab().values()) == load_tokenizer(tmp_path).n_vocab
