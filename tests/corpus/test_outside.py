"""Text of another kind than the corpus: balanced, apart from it, counted to the byte, and absent where it is off."""

import itertools
import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microlm.config import Config, load_config
from microlm.corpus import outside
from microlm.corpus.outside import (
    HEAD,
    KIND_BYTES,
    LONGEST,
    Document,
    chosen,
    cut,
    new_documents,
    packaged_texts,
    without_citations,
    write_outside,
)
from microlm.corpus.shards import TokenShards
from microlm.corpus.sources import refuse_unfit
from microlm.errors import UserError
from microlm.evaluation.scoring.held_out_loss import held_out
from microlm.parameters import BatchConfig, HubText
from microlm.pipeline.training_stages import Evaluator
from microlm.report.summary_table import sentences
from microlm.training.history import Evaluation, History
from tests.support.clones import ROOT
from tests.support.ranks import N_VOCAB, toy_student
from tests.support.tiny_run import byte_tokenizer, tiny_parameters
from tests.support.toy import toy_shards
from tests.support.toy_shards import write_shards

TOKENIZER = byte_tokenizer()
CORPUS = [f"{word} is a word of the corpus, number {n}. " * 3 for n, word in enumerate("abcdefghijklmnopqrstuvwxyz")]
EOT = 0
with tempfile.TemporaryDirectory() as _folder:
    (Path(_folder) / "params.yaml").write_text(tiny_parameters())
    SMOKE = load_config(Path(_folder) / "params.yaml")


def configured(**evaluation: Any) -> Config:
    """Scale smoke, with other values under `evaluation`."""
    return replace(SMOKE, at=replace(SMOKE.at, evaluation=replace(SMOKE.at.evaluation, **evaluation)))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_shards(CORPUS, TOKENIZER, tmp_path / "shards", validation_fraction=0.3, shard_tokens=1024)
    return tmp_path / "shards"


def toy_text(directory: Path, tokens: int, split: str = "outside") -> TokenShards:
    directory.mkdir()
    return toy_shards(directory, N_VOCAB, tokens, split)


def jsonl(path: Path, texts: list[str], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


# --- the packaged text ------------------------------------------------------------------------------------------------


def test_packaged_kinds_are_balanced_many_and_free_of_markup(parts: Path) -> None:
    texts = packaged_texts(parts)
    assert set(texts) == {"paper", "textbook", "news", "novel"}
    for kind, documents in texts.items():
        size = sum(len(document.encode()) for document in documents)
        assert 0.95 * KIND_BYTES < size <= KIND_BYTES, kind
        assert len(set(documents)) == len(documents) >= 30, kind
        assert all(len(document) <= LONGEST or "\n" not in document for document in documents), kind
    assert not re.search(r"BIBREF|INLINEFORM|DISPLAYFORM|FIGREF|TABREF|SECREF", "\n".join(texts["paper"]))


@given(texts=st.lists(st.text("ab \n", max_size=30), max_size=12), most=st.integers(0, 120), seed=st.randoms())
def test_what_is_chosen_depends_neither_on_order_nor_on_copies(texts: list[str], most: int, seed: Any) -> None:
    found = chosen(texts, most)
    mixed = texts * 2
    seed.shuffle(mixed)
    assert chosen(mixed, most) == found
    assert sum(len(text.encode()) for text in found) <= most and all(text.strip() for text in found)


@given(text=st.text("ab \n", min_size=1), longest=st.integers(1, 40))
def test_a_cut_text_is_its_first_whole_paragraphs(text: str, longest: int) -> None:
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    kept = cut(text, longest).split("\n") if paragraphs else []
    assert kept == paragraphs[: len(kept)] and len(kept) >= min(1, len(paragraphs))
    assert len(kept) <= 1 or len("\n".join(kept)) <= longest


def test_citations_leave_their_sentence_and_formulas_their_paragraph() -> None:
    said = "Words BIBREF8, BIBREF9, sentences (BIBREF10) and paragraphs BIBREF14 have been read as units of annotation."
    assert without_citations(said) == "Words, sentences and paragraphs have been read as units of annotation."
    assert without_citations(said + " See INLINEFORM0.") is None


# --- apart from the corpus --------------------------------------------------------------------------------------------

few = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@given(
    known=st.lists(few, min_size=1, max_size=8), asked=st.lists(few, min_size=1, max_size=8), chunk=st.integers(1, 9)
)
def test_no_document_that_the_corpus_has_is_left(known: list, asked: list, chunk: int) -> None:
    stream = np.array([token for document in known for token in (EOT, *document)], np.uint16)

    class Stream:
        n_tokens = len(stream)

        def read(self, start: int, length: int) -> np.ndarray:
            return stream[start : start + length]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside, "CHUNK_TOKENS", chunk)
        left = new_documents([Document("k", np.array(tokens, np.uint32)) for tokens in asked], [Stream()], EOT)
    assert [document.tokens.tolist() for document in left] == [tokens for tokens in asked if tokens not in known]


def test_document_is_known_again_by_its_beginning(corpus: Path, tmp_path: Path) -> None:
    longer = "x" * HEAD
    write_shards(
        [*CORPUS, longer + " as the corpus has it"], TOKENIZER, corpus, validation_fraction=0.3, shard_tokens=99
    )
    other = [f"something else, {n}; " * 9 for n in range(4)]
    named = jsonl(tmp_path / "o.jsonl", [CORPUS[3], *other, longer + " as it goes on elsewhere", CORPUS[5]])
    counts = write_outside(configured(outside=[named]).at, corpus, tmp_path / "outside")
    assert (counts["removed"], counts["documents"]) == (3, 4)
    tokens = TokenShards(tmp_path / "outside", "outside")
    assert tokens.read(0, tokens.n_tokens).tolist() == [i for t in other for i in (256, *t.encode())]


# --- counted ----------------------------------------------------------------------------------------------------------


def test_windows_and_bytes_are_those_of_the_text(corpus: Path, tmp_path: Path) -> None:
    texts = [f"naïve {n} — ünïcode {'z' * n}" for n in range(1, 40)]
    config = configured(outside=[jsonl(tmp_path / "o.jsonl", texts)])
    counts = write_outside(config.at, corpus, tmp_path / "outside")
    size = sum(len(text.encode()) for text in texts)
    assert counts["text_bytes"] == size and counts["tokens"] == size + len(texts)
    assert counts["kinds"] == {"files": {key: counts[key] for key in ("documents", "tokens", "text_bytes")}}
    found = held_out(config.at, corpus, tmp_path / "outside")
    assert list(found) == ["val", "outside"] and found["outside"].n_tokens == counts["tokens"]


def test_curve_has_the_loss_of_the_outside_windows_that_are_there(tmp_path: Path) -> None:
    val, other = toy_text(tmp_path / "a", 900, "val"), toy_text(tmp_path / "b", 99)
    batch, lengths, model = BatchConfig(16, 64, 2), np.full(N_VOCAB, 3), toy_student()
    asked = Evaluator(val, val, lengths, [], batch, 7, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "_hellaswag", lambda *_: {"acc_norm": 0.25})
        seen, alone = asked(model, None), replace(asked, outside=None)(model, None)
    nats = 0.0
    for window in range(6):
        rows = other.windows(np.array([window * 16]), 17)
        hidden = model.hidden(torch.from_numpy(rows[:, :-1]))
        log_p = torch.log_softmax(model.logits(hidden), -1)
        nats -= log_p.gather(-1, torch.from_numpy(rows[:, 1:, None])).sum().item()
    assert seen.ood_bpb == pytest.approx(nats / math.log(2) / (6 * 16 * 3), rel=1e-5)
    assert alone == replace(seen, ood_bpb=None)


# --- off, and refused -------------------------------------------------------------------------------------------------


def test_off_leaves_a_folder_that_says_so_and_nothing_to_read(corpus: Path, tmp_path: Path) -> None:
    at = configured(outside=None).at
    assert write_outside(at, corpus, tmp_path / "outside")["documents"] == 0
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["manifest.json"]
    assert list(held_out(at, corpus, tmp_path / "absent")) == ["val"]
    with pytest.raises(UserError, match=r"outside/manifest.json: has no split outside; .*repro -f -s outside"):
        held_out(configured().at, corpus, tmp_path / "outside")
    history = History()
    history.add_evaluation(3, Evaluation(1.5, 1.4, 2.0, {"acc_norm": 0.25}))
    assert history.loss[0]["ood_bpb"] is None and not [line for line in history.log if "ood" in line]


def test_shards_of_another_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    toy_text(tmp_path / "outside", 300)
    with pytest.raises(UserError, match=r"is of another tokenizer than .*repro -f -s outside"):
        held_out(configured().at, corpus, tmp_path / "outside")


def refused(config: Config) -> None:
    with config.naming_keys():
        refuse_unfit(config.at.evaluation.outside, config.at.corpus)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["nowhere/*.jsonl"], r"evaluation\.outside: no file matches 'nowhere/\*\.jsonl'"),
        (
            ["tests/fixtures/doc*.jsonl"],
            r"smoke\.evaluation\.outside: tests/fixtures/documents\.jsonl is in the corpus",
        ),
        (["params.yaml"], r"params\.yaml: cannot be read as text; evaluation\.outside takes"),
        (["{tmp}/titles.jsonl"], r"titles\.jsonl: has no column 'text', only title; set corpus\.text_column"),
        (["{tmp}/link.jsonl"], r"link\.jsonl is in the corpus itself; name text of another kind"),
    ],
)
def test_text_that_cannot_be_meant_is_refused_before_anything_runs(
    wanted: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    jsonl(tmp_path / "titles.jsonl", ["A title"], column="title")
    (tmp_path / "link.jsonl").symlink_to(ROOT / "tests" / "fixtures" / "documents.jsonl")
    with pytest.raises(UserError, match=told):
        refused(configured(outside=[path.replace("{tmp}", str(tmp_path)) for path in wanted]))


def test_dataset_of_the_corpus_is_refused_and_another_subset_is_not() -> None:
    config = configured(outside=HubText("a/b", "0" * 40, "one"))
    text = replace(config.at.corpus, source="hub", dataset="a/b", subset="one", revision="1" * 40)
    with pytest.raises(UserError, match=r"a/b \(one\) is the corpus itself"):
        refused(replace(config, at=replace(config.at, corpus=text)))
    refused(replace(config, at=replace(config.at, corpus=replace(text, subset="two"))))


@pytest.mark.parametrize("texts", [["too short"], [*CORPUS[:9], "too short"]])
def test_too_little_text_is_refused_and_the_old_folder_stays(texts: list[str], corpus: Path, tmp_path: Path) -> None:
    toy_text(tmp_path / "outside", 300)
    named = jsonl(tmp_path / "o.jsonl", texts)
    with pytest.raises(UserError, match=r"outside: 10 tokens.* 2 windows of batch.seq_len=64 need 129; name more"):
        write_outside(configured(outside=[named]).at, corpus, tmp_path / "outside")
    assert TokenShards(tmp_path / "outside", "outside").n_tokens == 301


def test_packaged_text_without_its_part_names_the_stage(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there; make it with: dvc repro fetch"):
        write_outside(configured(outside="packaged").at, corpus, tmp_path / "outside", tmp_path / "parts")


# --- said -------------------------------------------------------------------------------------------------------------

BEATS = {-1: "distillation beat plain continuation", 1: "plain continuation beat distillation"}


def difference(measure: str, sign: int) -> dict[str, float]:
    """Decided below or above 0, or, with 0, not decided."""
    low, high = {-1: (-0.03, -0.01), 0: (-0.01, 0.03), 1: (0.01, 0.03)}[sign]
    return {
        measure: 0.02 * sign or 0.01,
        f"{measure}_low": low,
        f"{measure}_high": high,
        f"{measure}_detectable": 0.005,
    }


@pytest.mark.parametrize(("inside", "outer"), [*itertools.product((-1, 0, 1), repeat=2)])
def test_first_sentence_speaks_of_both_texts_and_says_where_they_disagree(inside: int, outer: int) -> None:
    against = difference("val_bpb", inside) | difference("ood_bpb", outer)
    against |= {f"acc_norm{end}": 0.0 for end in ("", "_low", "_high", "_detectable")}
    trained = {"acc_norm": 0.5, "acc_norm_se": 0.01, "tokens": 100}
    teacher = {"source": "cache", "tokens_labelled": 50, "labelling_to_distilling_flops": 0.1}
    summary = {"control": trained, "continued": trained, "student": trained, "teacher": teacher}
    summary |= {"student_minus_continued": against, "student_minus_control": against}
    said = sentences(summary)[0]
    assert "inside the corpus's kind of text" in said.lower() and "outside it" in said
    assert {sign for sign, words in BEATS.items() if words in said} == {inside, outer} - {0}
    assert ("the other way round" in said) == (inside * outer == -1)
    assert ("do not tell" in said) == (0 in (inside, outer))
    assert said.count("covers 0") == [inside, outer].count(0) and said.count("\n") == 0
    alone = {key: value for key, value in against.items() if not key.startswith("ood")}
    assert "outside" not in sentences(summary | {"student_minus_continued": alone})[0]
