"""Token ids of questions against lm-evaluation-harness's rule, written out text by text."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microlm.corpus.tokenizer import Tokenizer, build_tokenizer
from microlm.errors import UserError
from microlm.evaluation.scoring.encoding import BatchEncoder, Encoding, encode
from microlm.evaluation.scoring.engine import score
from microlm.evaluation.tasks.prompts import Question
from microlm.models.architecture import ModelShape
from microlm.models.student import StudentLM

START, CONTEXT = 0, 300
SHOTS = "What is wet?\nAnswer: water\n\nWhat is hot?\nAnswer: fire\n\n"


class Pairs:
    """Cuts a text into pairs of characters: whatever is put before a text changes all its ids."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[1 + hash_of(text[i : i + 2]) for i in range(0, len(text), 2)] for text in texts]


def hash_of(piece: str) -> int:
    return sum(ord(letter) * 7**k for k, letter in enumerate(piece)) % 1000


@pytest.fixture(scope="module")
def gpt2(parts) -> Tokenizer:
    return build_tokenizer("gpt2", parts)


def question(context: str, *endings: str, number: str = "7") -> Question:
    return Question("toy", number, "", 0, context, endings, (), "", ())


def by_the_rule(tokenizer: BatchEncoder, context: str, ending: str) -> tuple[list[int], list[int]]:
    """White space at the context's end is the ending's; the ending's ids are the whole text's beyond the context's."""
    kept = context.rstrip()
    alone, whole = (list(ids) for ids in tokenizer.encode_batch([kept, context + ending]))
    return alone or [START], whole[len(alone) :]


def in_full(encoding: Encoding) -> list[list[int]]:
    """All that each question has read before its endings."""
    return [[*(encoding.prefix if q.shares_prefix else []), *q.context] for q in encoding.questions]


TEXT = st.text("ab. \n\t'é", max_size=12)
WORDS = st.text("ab. \n'é", min_size=1, max_size=8).filter(lambda text: text.strip())
QUESTIONS = st.lists(st.tuples(TEXT, WORDS, WORDS), min_size=1, max_size=6)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(QUESTIONS, st.sampled_from(["", SHOTS, "a\n\n"]), st.sampled_from(["gpt2", "pairs"]))
def test_ids_are_those_of_the_joint_encoding_whatever_is_shared(gpt2, texts, prefix: str, kind: str) -> None:
    tokenizer = gpt2 if kind == "gpt2" else Pairs()
    expected = [[by_the_rule(tokenizer, prefix + c, ending) for ending in endings] for c, *endings in texts]
    asked = [question(context, *endings) for context, *endings in texts]
    if any(not ending for row in expected for _, ending in row):
        with pytest.raises(UserError, match=r"toy question 7: ending \d has no token of its own"):
            encode(asked, tokenizer, CONTEXT, START, prefix)
        return
    encoding = encode(asked, tokenizer, CONTEXT, START, prefix)
    assert in_full(encoding) == [row[0][0] for row in expected]
    assert [[list(e) for e in q.endings] for q in encoding.questions] == [[e for _, e in row] for row in expected]
    assert all(len(q.context) for q in encoding.questions)
    assert all(q.context.dtype == np.int64 for q in encoding.questions)


def test_a_prefix_is_shared_up_to_the_token_that_what_follows_changes(gpt2) -> None:
    """GPT-2 reads two line feeds as one token, but only at the end of a text."""
    asked = [question(f"Is {word} big?\nAnswer:", " yes", " no") for word in ("rain", "snow", "ice")]
    encoding = encode(asked, gpt2, CONTEXT, prefix=SHOTS)
    assert gpt2.encode(SHOTS)[-1] != gpt2.encode("\n")[0]
    assert len(encoding.prefix) == len(gpt2.encode(SHOTS)) - 1 and encoding.unshared == 0


def test_a_question_that_starts_otherwise_is_read_without_the_shared_prefix(gpt2) -> None:
    """The context of one is empty: by the rule its prefix ends before the white space, which its endings get."""
    asked = [question("Is rain wet?", " yes", " no"), question("", "Yes", "No"), question("Is ice hot?", " yes", " no")]
    prefix = "One." + " \n" * 20
    encoding = encode(asked, gpt2, CONTEXT, prefix=prefix)
    assert [q.shares_prefix for q in encoding.questions] == [True, False, True] and encoding.unshared == 1
    assert in_full(encoding)[1] == gpt2.encode("One.")
    assert list(encoding.questions[1].endings[0]) == gpt2.encode(prefix + "Yes")[2:]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(QUESTIONS)
def test_encoded_apart_context_and_ending_know_nothing_of_each_other(gpt2, texts) -> None:
    encoding = encode([question(c, *endings) for c, *endings in texts], gpt2, CONTEXT, START, joint=False)
    for found, (context, *endings) in zip(encoding.questions, texts):
        assert list(found.context) == (gpt2.encode(context) or [START])
        assert [list(ids) for ids in found.endings] == [gpt2.encode(ending) for ending in endings]


@pytest.mark.parametrize(("prefix", "limit"), [("", 12), (SHOTS, 12), (SHOTS, 30)])
def test_a_question_too_long_loses_its_start_and_is_counted(gpt2, prefix: str, limit: int) -> None:
    asked = [question("a cat " * 10, "on a mat", "on"), question("a", " b", " c", number="8")]
    encoding = encode(asked, gpt2, limit, prefix=prefix, joint=False)
    whole = gpt2.encode(prefix + "a cat " * 10)
    room = limit - (len(gpt2.encode("on a mat")) - 1)
    assert in_full(encoding)[0] == whole[-room:]
    assert encoding.questions[0].truncated == len(whole) - room > 0
    fits = len(gpt2.encode(prefix + "a")) <= limit
    assert encoding.truncated == 2 - fits
    assert not prefix or encoding.unshared == 2 - (fits and len(encoding.prefix) > 0)


def test_an_ending_longer_than_the_model_reads_is_refused(gpt2) -> None:
    with pytest.raises(UserError, match=r"toy question 7 has an ending of 30 tokens, the model only 29") as error:
        encode([question("a", " one" * 30, " b")], gpt2, 29)
    assert "\n" not in str(error.value)


def test_an_empty_context_without_a_start_token_is_refused(gpt2) -> None:
    with pytest.raises(UserError, match="toy question 7 has an empty context"):
        encode([question("", " a", " b")], gpt2, CONTEXT)


def test_ids_to_begin_with_stand_before_prefix_and_context(gpt2) -> None:
    asked = [question(f"Is {word} big?", " yes", " no") for word in ("rain", "snow")]
    plain, begun = (encode(asked, gpt2, CONTEXT, prefix=SHOTS, begin=begin) for begin in ((), (5, 6)))
    assert in_full(begun) == [[5, 6, *ids] for ids in in_full(plain)]
    assert list(begun.prefix) == [5, 6, *plain.prefix]


@torch.no_grad()
def test_a_shared_prefix_scores_as_the_same_text_in_front_of_every_context(gpt2) -> None:
    model = StudentLM(ModelShape(gpt2.n_vocab, gpt2.n_vocab, 2, 32, 2, 16, 64, CONTEXT, 10000.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    asked = [question(f"Is {word} big?\nAnswer:", " yes", " no, it is not") for word in ("rain", "snow", "ice")]
    written = [question(SHOTS + q.context, *q.endings) for q in asked]
    shared, apart = encode(asked, gpt2, CONTEXT, prefix=SHOTS), encode(written, gpt2, CONTEXT)
    ours, theirs = (score(model, e.questions, 256, e.prefix) for e in (shared, apart))
    np.testing.assert_allclose(np.stack(ours), np.stack(theirs), rtol=1e-5)
