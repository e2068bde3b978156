"""Ids with gaps: every reader counts one vocabulary, 1 + the largest id, and scores what transformers scores."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer
from microlm.corpus.tokenizer_format import ALPHABET, BYTE_LEVEL, byte_level_definition
from microlm.models.model_files import from_transformers
from microlm.objective.fused_head import token_nats
from microlm.teacher.projection import first_student_tokens
from tests.support.tiny_teacher import tiny_llama

TEXT = "A plant is a living thing. "


@settings(max_examples=20)
@given(gap=st.integers(0, 60), padding=st.integers(0, 40))
def test_rows_up_to_the_largest_id_are_scored_and_padding_is_not(
    tmp_path_factory: pytest.TempPathFactory, gap: int, padding: int
) -> None:
    end = len(ALPHABET) + gap
    vocab = {character: byte for character, byte in ALPHABET.items()} | {END_OF_TEXT: end}
    tokenizer = Tokenizer("gaps", byte_level_definition(vocab, [], {END_OF_TEXT: end}, BYTE_LEVEL), "the test")
    folder: Path = tmp_path_factory.mktemp("gaps")
    tiny_llama(tokenizer, padded=end + 1 + padding).save_pretrained(folder)
    tokenizer.save(folder)

    model, theirs = from_transformers(str(folder), None, torch.float32)
    assert model.n_vocab == tokenizer.n_vocab == load_tokenizer(folder).n_vocab == end + 1
    assert len(theirs) == len(ALPHABET) + 1  # what is no count of ids
    assert first_student_tokens(tokenizer, tokenizer).shape == (end + 1,)

    ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(TEXT), tokenizer.eot_id]])
    with torch.inference_mode():
        logits = model.network(ids[:, :-1]).logits[..., : end + 1]
        expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
        nats = token_nats(model.hidden(ids[:, :-1])[0], model.head_weight, ids[0, 1:], model.n_vocab)
    assert torch.allclose(nats, expected, rtol=1e-5, atol=1e-5)
