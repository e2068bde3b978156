"""Promises of SentencePiece's tokenizers: the reference's ids, and behind them the bytes of any text."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from microlm.corpus.metaspace import MetaspaceTokenizer, teacher_tokenizer
from microlm.corpus.metaspace_format import CONTROL, NORMAL, SPACE, USER_DEFINED, metaspace_definition
from microlm.corpus.tokenizer import Tokenizer, json_tokenizer
from microlm.errors import UserError
from microlm.teacher.projection import first_student_tokens, spell
from tests.support.metaspace import KINDS, SPECIALS, TEXTS, fresh_definition, merged, metaspace_tokenizer
from tests.support.workspace import short_tokenizer

SPACES = st.sampled_from(["  ", "   ", "\n", "\n\n", "\n\n\n", "\t", SPACE, f"{SPACE}the", "\u00a0"])
WORDS = st.sampled_from(["the", " wall", "2019", " 42", "naïve", "n\u0303", "日本", "👩\u200d👧", "\x00", "\U0006d000"])
FRAGMENTS = SPACES | WORDS | st.sampled_from([*SPECIALS, "<0x41>", *TEXTS])
ANY = st.lists(FRAGMENTS | st.text(max_size=8), max_size=10).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(text=ANY)
def test_ids_are_those_of_merging_by_the_list_and_their_bytes_are_the_texts(kind: str, text: str) -> None:
    tokenizer = metaspace_tokenizer(kind)
    ids = tokenizer.encode_as_it_is(text).tolist()
    assert ids == merged(fresh_definition(kind), text)
    assert b"".join(map(tokenizer.bytes_of, ids)) == text.encode()
    assert not set(ids) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200)
@given(raw=st.binary(max_size=20) | ANY.map(str.encode), start=st.integers(0, 4), stop=st.integers(0, 4))
def test_any_bytes_are_spelled(kind: str, raw: bytes, start: int, stop: int) -> None:
    tokenizer, raw = metaspace_tokenizer(kind), raw[start : len(raw) - stop]  # begins and ends within a character
    ids, ends = spell(tokenizer, raw)
    assert b"".join(map(tokenizer.bytes_of, ids.tolist())) == raw
    assert ends.tolist() == np.cumsum([len(tokenizer.bytes_of(i)) for i in ids]).tolist()


@settings(max_examples=200)
@given(text=ANY)
def test_but_for_the_space_before_it_a_text_has_the_references_ids(text: str) -> None:
    text = text.replace(SPACE, "")
    gemma, llama, words = map(metaspace_tokenizer, KINDS)
    assert gemma.encode_batch([text])[0].tolist() == gemma.encode_as_it_is(text).tolist()
    # one that writes a space before every text gives what a space that is there gives
    expected = llama.encode_as_it_is(f" {text}" if text else text).tolist()
    assert llama.encode_batch([text])[0].tolist() == expected
    prefixed = text if text.startswith(" ") or not text else f" {text}"
    assert words.encode_batch([text])[0].tolist() == words.encode_as_it_is(prefixed).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_file_alike_and_begins_alike(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fresh_definition(kind)))
    theirs, ours = PreTrainedTokenizerFast(tokenizer_file=str(path)), teacher_tokenizer(path)
    for text, ids in zip(TEXTS, ours.encode_batch(TEXTS)):
        assert theirs(text)["input_ids"] == [*ours.begin, *ids.tolist()]
    assert ours.begin == (() if kind == "metaspace" else (1,))
    assert ours.fingerprint == metaspace_tokenizer(kind).fingerprint and ours.eot_id == 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_bytes_or_is_special_and_a_first_token_of_the_students(kind: str) -> None:
    tokenizer, student = metaspace_tokenizer(kind), short_tokenizer()
    assert set(tokenizer.special_tokens) == set(SPECIALS)
    for token in range(tokenizer.n_vocab):
        assert bool(tokenizer.bytes_of(token)) != (token in tokenizer.special_tokens.values())
        assert tokenizer.byte_lengths[token] == len(tokenizer.bytes_of(token))
    first = first_student_tokens(tokenizer, student)
    for token, mapped in enumerate(first.tolist()):
        assert tokenizer.bytes_of(token).startswith(student.bytes_of(mapped))
        assert (mapped == student.eot_id) == (token in tokenizer.special_tokens.values())


def settings_of(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda definition: definition["model"].update(changes)


def replaced(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda definition: definition.update({key: value})


def added(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda definition: definition["added_tokens"][-1].update(changes)


CHANGES = {
    "its model is Unigram, and of SentencePiece's": settings_of(type="Unigram", vocab=[["<unk>", 0.0]]),
    "its model is WordPiece": settings_of(type="WordPiece"),
    "its model has dropout=0.1": settings_of(dropout=0.1),
    "its model has ignore_merges=True": settings_of(ignore_merges=True),
    "its model has end_of_word_suffix='@'": settings_of(end_of_word_suffix="@"),
    "its model has no byte_fallback": settings_of(byte_fallback=False),
    "no token for the byte <0xE2>": lambda made: made["model"]["vocab"].pop("<0xE2>"),
    "its normalizer NFKC is not one": replaced("normalizer", {"type": "NFKC"}),
    "its normalizer Precompiled is not one": replaced(
        "normalizer", {"type": "Precompiled", "precompiled_charsmap": ""}
    ),
    "nothing in it writes a space": replaced("normalizer", None),
    "its pre_tokenizer Digits is not one": replaced("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
    "its added token '  ' has lstrip": added(lstrip=True),
    "its added token '  ' has single_word": added(single_word=True),
    "it has an added token without a spelling": added(content=""),
    "is also made of ordinary text": lambda made: added(content="".join(made["model"]["merges"][0]), special=True)(
        made
    ),
    "has no special token <|endoftext|>": lambda made: made["added_tokens"][2].update(content="<end>"),
    "token <0x41> for a byte is also made": lambda made: made["model"]["merges"].append(["<0x4", "1>"]),
    "two entries of its vocabulary have the same id": lambda made: made["model"]["vocab"].update({"zz": 300}),
}


@pytest.mark.parametrize("told", CHANGES)
def test_a_setting_that_would_not_be_obeyed_is_refused_in_one_line(told: str, tmp_path: Path) -> None:
    changed, path = fresh_definition("gemma"), tmp_path / "tokenizer.json"
    CHANGES[told](changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError) as error:
        teacher_tokenizer(path)
    assert told in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ") and "choose another teacher" in str(error.value)


def test_what_is_no_sentencepiece_is_read_or_refused_as_before(tmp_path: Path) -> None:
    short_tokenizer().save(tmp_path)
    assert isinstance(teacher_tokenizer(tmp_path / "tokenizer.json"), Tokenizer)
    changed = fresh_definition("llama")
    del changed["model"]["merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"tokenizer.json: not a whole tokenizer.json \(KeyError\('merges'\)\)"):
        teacher_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer.json: not a Hugging Face tokenizer.json"):
        teacher_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="is not there"):
        teacher_tokenizer(tmp_path / "nowhere.json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_corpus_takes_none_and_says_why(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fresh_definition(kind)))
    with pytest.raises(UserError, match=r"SentencePiece's, which a teacher may have and a corpus not") as error:
        json_tokenizer(path)
    assert "\n" not in str(error.value)


LETTERS = "ab" + SPACE


@settings(max_examples=200)
@given(
    words=st.lists(st.text(LETTERS, min_size=2, max_size=4), min_size=1, max_size=8, unique=True),
    text=st.text("ab ", max_size=14),
)
def test_scores_become_merges_by_which_the_best_neighbours_join_first(words: list[str], text: str) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", *LETTERS, *words]
    kinds = [CONTROL] * 3 + [6] * 256 + [USER_DEFINED] + [NORMAL] * (len(LETTERS) + len(words))
    scores = {piece: -float(i) for i, piece in enumerate(pieces)}
    ordinary = {piece for piece, kind in zip(pieces, kinds) if kind == NORMAL}
    cuts = ([c for c in range(1, len(w)) if {w[:c], w[c:]} <= ordinary] for w in words)
    assume(all(len(ways) < 2 for ways in cuts))  # of two ways to the same piece SentencePiece takes the left one
    made = metaspace_definition(pieces, list(scores.values()), kinds, 1, 0)
    symbols = list(text.replace(" ", SPACE))
    while True:
        joined = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ordinary]
        if not joined:
            break
        _, i = min(joined)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    tokenizer = MetaspaceTokenizer("scores", made, "the test")
    assert tokenizer.encode_as_it_is(text).tolist() == [pieces.index(symbol) for symbol in symbols]
    assert tokenizer.begin == (1,) and tokenizer.encode_as_it_is("\n\n").tolist() == [pieces.index("\n\n")]
