"""Promises of what models write: transformers' tokens for the same seed, whole characters, and an end that is told."""

import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from microlm.errors import UserError
from microlm.evaluation.candidates import Candidate, load_candidate
from microlm.evaluation.generation import BROKEN, Continuation, Decoding, Writer, _Stream
from microlm.evaluation.samples import PROMPTS, SAMPLE_TOKENS, samples
from microlm.models.model_files import as_transformers, load_student
from tests.support.tiny_candidates import as_others_export, repository, save_tiny_student
from tests.support.workspace import short_tokenizer

PROMPT = "The city of Rome"
OURS, THEIRS = "models/student", "models/llama"


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        yield there


def loaded(name: object) -> Candidate:
    return load_candidate(str(name), None, torch.float32)


@cache
def kept(name: str) -> Writer:
    return Writer(loaded(name))


def writer(name: object) -> Writer:
    """Of a folder that no test changes, read once."""
    return kept(str(name)) if name in (OURS, THEIRS) else Writer(loaded(name))


DECODINGS = (
    Decoding(24),
    Decoding(24, do_sample=True),
    Decoding(24, do_sample=True, temperature=0.7),
    Decoding(24, do_sample=True, temperature=1.5, top_k=20),
    Decoding(24, do_sample=True, top_p=0.8, repetition_penalty=1.3),
    Decoding(24, repetition_penalty=1.5),
)


@cache
def read_by_transformers(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


@pytest.mark.parametrize("name", [OURS, THEIRS])
@pytest.mark.parametrize("decoding", DECODINGS, ids=lambda found: " ".join(found.asked()))
def test_the_same_seed_gives_the_tokens_of_transformers(name: str, decoding: Decoding) -> None:
    network, tokenizer = read_by_transformers(name)
    ids = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    if name == OURS:
        ids = [tokenizer.eos_token_id, *ids]
    padding = list(range(len(tokenizer), network.config.vocab_size))
    assert padding
    row, found = torch.tensor([ids]), writer(name)
    for seed in (0, 7):
        set_seed(seed)
        asked = {"suppress_tokens": padding, "pad_token_id": 0, **decoding.asked()}
        theirs = network.generate(row, attention_mask=torch.ones_like(row), **asked)[0, len(ids) :].tolist()
        random.random(), torch.rand(1)  # whatever drew before
        written = found.write(PROMPT, decoding, seed)
        assert written.text == tokenizer.decode(theirs, skip_special_tokens=True)
        assert written.tokens == len(theirs) - written.ended


def test_greedy_tokens_are_those_of_the_largest_logits_without_a_cache() -> None:
    model, tokenizer, ids = load_student(Path(OURS)), short_tokenizer(6000), writer(OURS).encode(PROMPT)
    row = list(ids)
    with torch.inference_mode():
        for _ in range(12):
            row.append(int(model.logits(model.hidden(torch.tensor([row]))[:, -1]).argmax()))
    assert writer(OURS).write(PROMPT, Decoding(12)).text == tokenizer.decode(row[len(ids) :])


def test_a_student_for_transformers_is_the_student_and_no_copy() -> None:
    candidate = loaded(OURS)
    network = as_transformers(candidate.model, 0)
    ours, theirs = candidate.model.state_dict(), network.state_dict()
    assert all(theirs[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())
    tokens = torch.arange(30)[None]
    with torch.inference_mode():
        logits = network(tokens).logits[..., : candidate.model.n_vocab]
        torch.testing.assert_close(logits, candidate.model.logits(candidate.model.hidden(tokens)), rtol=1e-5, atol=1e-4)


def test_a_prompt_begins_as_the_models_training_text_did(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(OURS)
    plain = tokenizer(PROMPT)["input_ids"]
    assert writer(OURS).encode(PROMPT) == [tokenizer.eos_token_id, *plain]
    assert writer(OURS).encode("") == [tokenizer.eos_token_id]
    others = as_others_export(Path(OURS), tmp_path / "others")
    assert writer(others).encode(PROMPT) == plain
    with pytest.raises(UserError, match=r"--prompt: is empty, and nothing begins a text of .*others; give it a word"):
        writer(others).encode("")
    rules = json.loads((others / "tokenizer.json").read_text())
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [tokenizer.eos_token_id], "tokens": ["<|endoftext|>"]}
        },
    }
    (others / "tokenizer.json").write_text(json.dumps(rules))
    theirs = AutoTokenizer.from_pretrained(others)(PROMPT)["input_ids"]
    assert theirs == [tokenizer.eos_token_id, *plain] == writer(others).encode(PROMPT)


def test_a_row_of_padding_is_never_written(tmp_path: Path) -> None:
    candidate = loaded(OURS)
    with torch.no_grad():  # any direction is that of some padding row
        rows = candidate.model.head_weight[candidate.model.n_vocab :]
        rows.copy_(100 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    row = torch.tensor([Writer(candidate).encode(PROMPT)])
    network = as_transformers(candidate.model, 0)
    naive = network.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert (naive[0, row.shape[1] :] >= candidate.model.n_vocab).all()
    (ids,) = Writer(candidate).generate(row.tolist(), Decoding(8))
    assert ids and max(ids) < candidate.model.n_vocab


def test_the_end_is_told_and_ends_the_text(tmp_path: Path) -> None:
    others = as_others_export(Path(OURS), tmp_path / "others")
    greedy = writer(others).generate([writer(others).encode(PROMPT)], Decoding(12))[0]
    end = next(token for place, token in enumerate(greedy) if place > 2 and token not in greedy[:place])
    settings = json.loads((others / "generation_config.json").read_text())
    (others / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": [settings["eos_token_id"], end]})
    )
    before = greedy[: greedy.index(end)]
    found = writer(others).write(PROMPT, Decoding(12))
    assert found.ended and found.tokens == len(before)
    (beside,) = writer(others).write_each([PROMPT], Decoding(12))
    assert beside == found


@pytest.mark.parametrize("left", [1, 5])
def test_no_token_is_written_beyond_the_models_positions(left: int) -> None:
    save_tiny_student(Path("tight"), context=left + len(writer(OURS).encode(PROMPT)))
    heard: list[str] = []
    found = writer("tight").write(PROMPT, Decoding(40), hear=heard.append)
    assert found.tokens == left and not found.ended and "".join(heard) == found.text
    longer = PROMPT + " and" * left
    with pytest.raises(UserError, match=r"^--prompt: takes \d+ tokens of tight, which has \d+ positions; shorten it$"):
        writer("tight").write(longer, Decoding(40))
    assert writer("tight").write_each([longer, PROMPT], Decoding(40)) == [Continuation("", 0, False), found]


@pytest.mark.parametrize("name", [OURS, THEIRS])
def test_a_batch_is_written_as_each_by_itself(name: str) -> None:
    found, prompts = writer(name), (PROMPT, "A", "naïve 日本語 " * 5)
    assert found.write_each(prompts, Decoding(16)) == [found.write(prompt, Decoding(16)) for prompt in prompts]


@given(text=st.text(max_size=20), noise=st.lists(st.integers(0, 6255), max_size=8), prompt=st.text(max_size=8))
def test_what_is_heard_is_the_text_in_whole_characters(text: str, noise: list[int], prompt: str) -> None:
    tokenizer, heard = short_tokenizer(6000), []
    # bytes apart, so that characters come in pieces; then tokens that may be broken
    spelled = [token for byte in text.encode() for token in tokenizer.encode_piece(bytes([byte]))]
    before, new = tokenizer.encode(prompt), [*spelled, *noise]
    stream = _Stream(tokenizer.decode, before, heard.append)
    stream.put(torch.tensor([before]))
    for place, token in enumerate(new):
        stream.put(torch.tensor([token]))
        if place < len(spelled):
            assert text.startswith("".join(heard)) or BROKEN in text
    stream.end()
    assert "".join(heard) == tokenizer.decode([*before, *new])[len(tokenizer.decode(before)) :]


def test_samples_are_what_the_model_writes_greedily_to_the_eight_prompts() -> None:
    candidate = loaded(OURS)
    found = samples(candidate)
    assert (found["max_new_tokens"], found["decoding"], len(found["samples"])) == (SAMPLE_TOKENS, "greedy", 8)
    assert [row["prompt"] for row in found["samples"]] == list(PROMPTS) and len(set(PROMPTS)) == 8
    for row in found["samples"]:
        alone = Writer(candidate).write(row["prompt"], Decoding(SAMPLE_TOKENS))
        assert row == {
            "prompt": row["prompt"],
            "continuation": alone.text,
            "tokens": alone.tokens,
            "ended": alone.ended,
        }
        assert row["tokens"] == SAMPLE_TOKENS or row["ended"]
    assert samples(loaded(OURS)) == found


def test_samples_leave_a_models_own_penalty_out(tmp_path: Path) -> None:
    others = as_others_export(Path(OURS), tmp_path / "others")
    plain, settings = samples(loaded(others)), json.loads((others / "generation_config.json").read_text())
    own = {"repetition_penalty": 1.9, "do_sample": True, "temperature": 5.0}
    (others / "generation_config.json").write_text(json.dumps(settings | own))
    assert samples(loaded(others)) == plain
    penalized = writer(others).write(PROMPTS[0], Decoding(SAMPLE_TOKENS))
    assert penalized.text != plain["samples"][0]["continuation"]


def test_samples_of_a_model_too_short_for_a_prompt_are_blank_there() -> None:
    save_tiny_student(Path("short"), context=12)
    rows = samples(loaded("short"))["samples"]
    long = [row for row, prompt in zip(rows, PROMPTS) if len(writer(OURS).encode(prompt)) >= 12]
    assert long and all((row["continuation"], row["tokens"], row["ended"]) == ("", 0, False) for row in long)
    assert any(row["tokens"] for row in rows)
