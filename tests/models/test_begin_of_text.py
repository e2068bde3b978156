"""A tokenizer that puts a begin-of-text token before every text gets one here where lm-evaluation-harness gives it."""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from microlm.evaluation.candidates import Candidate, TransformersTokenizer, load_candidate
from microlm.evaluation.results.store import Result
from microlm.evaluation.run import identity, score_benchmark
from microlm.evaluation.tasks.benchmarks import Material, benchmarks, gather
from tests.support.tiny_candidates import FIXTURES, repository

BOS = "<|endoftext|>"
LLAMA, BEGINS = Path("models/llama"), Path("models/begins")
BATCH_TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def folder(parts: Path) -> Iterator[Path]:
    with repository(parts) as there:
        if not BEGINS.exists():
            save_with_begin_of_text(LLAMA, BEGINS)
        yield there


def save_with_begin_of_text(directory: Path, target: Path) -> None:
    """The same weights; the tokenizer's post-processor puts BOS before each text, as Llama 3's does."""
    shutil.copytree(directory, target)
    path = target / "tokenizer.json"
    definition = json.loads(path.read_text())
    (number,) = [token["id"] for token in definition["added_tokens"] if token["content"] == BOS]
    begin, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BOS: {"id": BOS, "ids": [number], "tokens": [BOS]}},
    }
    path.write_text(json.dumps(definition))


def asked(task: str, protocol: str, shots: int = 0, limit: int = 12) -> Material:
    (material,) = gather(benchmarks([task], protocol, [shots], limit), FIXTURES, hub=False)
    return material


def scored(candidate: Candidate, material: Material) -> Result:
    return score_benchmark(candidate, material, BATCH_TOKENS)


def loaded(name: Path | str) -> Candidate:
    return load_candidate(str(name), None, torch.float32)


@cache
def transformers_own(directory: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    return AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)


@torch.inference_mode()
def by_the_harness(directory: Path, context: str, ending: str) -> float:
    """lm-eval 0.4.13: white space goes to the ending, whose ids are the whole text's beyond the context's, each encoded
    as the tokenizer is set.
    """
    tokenizer, network = transformers_own(directory)
    kept = context.rstrip()
    before, whole = (tokenizer.encode(text) for text in (kept, context + ending))
    ids = torch.tensor(whole)
    log_p = network(ids[None, :-1]).logits[0, :, : len(tokenizer)].log_softmax(-1)
    return -float(log_p.gather(1, ids[1:, None])[-(len(whole) - len(before)) :].sum())


@pytest.mark.parametrize(
    ("task", "protocol", "shots"),
    [
        ("rte", "lm-eval", 0),
        ("hellaswag", "lm-eval", 0),
        ("hellaswag", "olmes", 1),
        ("cb", "infill", 0),
        ("snli", "question", 0),
    ],
)
def test_scores_are_those_of_the_harness_with_its_begin_of_text(task: str, protocol: str, shots: int) -> None:
    begins, material = loaded(BEGINS), asked(task, protocol, shots, limit=3)
    found = scored(begins, material)
    table = found.table
    assert found.metrics["truncated"] == 0
    for row, question in zip(table.itertuples(), material.questions, strict=True):
        for k, ending in enumerate(question.endings):
            theirs = by_the_harness(BEGINS, material.prefix + question.context, ending)
            assert getattr(row, f"nats_{k}") == pytest.approx(theirs, rel=2e-6, abs=2e-4)
    without = scored(loaded(LLAMA), material).table
    assert np.abs(table["nats_0"] - without["nats_0"]).min() > 1e-3


def test_completion_and_tokenizers_that_add_none_are_as_they_were() -> None:
    begins, llama = loaded(BEGINS), loaded(LLAMA)
    assert begins.begin == (begins.start_token,) and llama.begin == ()
    assert loaded("models/student").begin == ()  # tests/models/test_hub.py says it of the packaged teacher
    material = asked("hellaswag", "completion")
    a, b = (scored(candidate, material).table for candidate in (begins, llama))
    np.testing.assert_allclose(a["nats_0"], b["nats_0"], rtol=1e-6)


def test_results_with_and_without_it_are_told_apart() -> None:
    material = asked("rte", "lm-eval")
    begins, llama = (identity(loaded(name), material) for name in (BEGINS, LLAMA))
    assert begins.tokenizer != llama.tokenizer and begins.model_digest == llama.model_digest
    assert begins.questions_sha256 == llama.questions_sha256  # so that models of both kinds can be compared


@pytest.mark.parametrize("adds", [True, False])
def test_the_tokenizer_s_own_setting_decides(adds: bool) -> None:
    class Slow:
        """Without rules to look at, as tokenizers written in Python are."""

        bos_token_id = 7

        def __call__(self, texts: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [7] * (adds and add_special_tokens) + [1, 2]}

        def get_vocab(self) -> dict[str, int]:
            return {"a": 1}

    found = TransformersTokenizer(Slow())
    assert found.begin == ((7,) if adds else ())
