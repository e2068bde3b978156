"""A SentencePiece teacher of a byte-level student: its begin of text, what it covers, and the stages that read it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import Batch, cached_windows
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.evaluation.candidates import load_pipeline_model
from microlm.evaluation.scoring.encoding import encode
from microlm.evaluation.tasks.prompts import Question
from microlm.files import read_json
from microlm.models.start_request import check_start
from microlm.models.teacher_source import teacher_source
from microlm.pipeline.capture import CACHE, capture_teacher
from microlm.pipeline.start import make_start
from microlm.teacher.cache import TeacherCache, cache_identity
from microlm.teacher.projection import Projection
from tests.support.metaspace import KINDS, TEXTS, definition, metaspace_tokenizer
from tests.support.other_tokenizers import random_network
from tests.support.toy_records import cached_records
from tests.support.workspace import RUNTIME, config_of, inside, make_workspace, short_tokenizer, verify

END, BEGIN = "\x01", "\x02"  # where the student's text ends, and where the teacher is told that one begins


def spelled(bytes_of, ids: list[int], special: dict[int, str]) -> str:
    """Each token's bytes, a letter each, and the marks of special tokens."""
    return "".join(special[i] if i in special else bytes_of(i).decode("latin-1") for i in ids)


pieces = st.lists(st.sampled_from([*TEXTS, "naïve ", "日本", "  the", "2019", END, END]), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100)
@given(texts=pieces, start=st.integers(0, 6), length=st.integers(2, 40), context=st.integers(3, 50))
def test_begin_of_text_stands_where_the_window_begins_and_moves_no_boundary(kind, texts, start, length, context):
    student, teacher = short_tokenizer(), metaspace_tokenizer(kind)
    row = [i for text in texts for i in ([student.eot_id] if text == END else student.encode(text))]
    row = (row * (start + length))[start : start + length + 1]
    projection = Projection(teacher, student, context)
    aligned = projection.align(Batch(np.array([0]), torch.tensor([row])))
    assume(aligned.tokens.numel())  # a window that is one token to the teacher has nothing to be predicted
    marks = {teacher.eot_id: END, **dict.fromkeys(teacher.begin, BEGIN)}
    text = spelled(student.bytes_of, row, {student.eot_id: END})
    read = [*aligned.tokens[0].tolist(), int(aligned.targets[0, -1])]
    heard = spelled(teacher.bytes_of, read, marks)
    told = BEGIN + text.removeprefix(END) if teacher.begin else text
    assert told.startswith(heard) and (len(read) == context + 1 or heard == told)

    # a begin in the place of an end stands for it, any other for nothing
    marks |= dict.fromkeys(teacher.begin, END if text[0] == END else "")
    lengths = [len(spelled(teacher.bytes_of, read[: j + 1], marks)) for j in range(len(read) - 1)]
    states = iter(aligned.states.tolist())
    for i in range(len(row) - 1):
        before = len(spelled(student.bytes_of, row[: i + 1], {student.eot_id: END}))
        places = [j for j, length in enumerate(lengths) if length == before]
        assert aligned.shared[i] == bool(places)
        covered = bool(places) and projection.first[read[places[0] + 1]] == row[i + 1]
        assert aligned.covered[i] == covered
        if covered:
            assert next(states) == places[0]
    assert next(states, None) is None and aligned.real.all()


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 30))
def test_pushing_forward_keeps_the_mass(kind, seed, spread):
    teacher, student = metaspace_tokenizer(kind), short_tokenizer()
    p = torch.randn(3, teacher.n_vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pushed = Projection(teacher, student, 10).push(torch.softmax(spread * p, -1))
    torch.testing.assert_close(pushed.sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture under a teacher of SentencePiece's tokens."""
    top = make_workspace(tmp_path_factory.mktemp("sentencepiece") / "workspace")
    folder, tokenizer = top / "other-teacher", metaspace_tokenizer("gemma")
    random_network("llama", tokenizer.n_vocab + 13, context=256).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(definition("gemma"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    params = (top / "params.yaml").read_text()
    (top / "params.yaml").write_text(re.sub(r"model: data/tiny-teacher", "model: other-teacher", params))
    with inside(top):
        capture_teacher(config_of(top), RUNTIME)
    return top


def test_stages_capture_verify_and_start_with_it(workspace):
    with inside(workspace):
        config, shards = config_of(workspace), TokenShards(Path("data/shards"), "train")
        windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
        identity = cache_identity(config.at.teacher, config.at.batch.seq_len, shards)
        records = cached_records(TeacherCache(CACHE, identity, windows), windows)
        told = read_json("metrics/teacher.json", "teacher")
        assert told["coverage"] == pytest.approx(records["covered"].mean()) and 0.2 < told["coverage"] < 1
        assert told["val"]["bpb"] > 0 and told["val_projected"]["coverage"] > 0.2
        make_start(config, RUNTIME)
    assert verify(workspace, "--windows", "4") == 0


@pytest.mark.parametrize("kind", ["pruned", "embedding"])
def test_no_student_is_cut_out_of_it(workspace, kind):
    with inside(workspace):
        config, told = replace(config_of(workspace), start=kind), "other-teacher has another tokenizer"
        with pytest.raises(UserError, match=rf"{told} .*start: {kind} needs the same") as error:
            make_start(config, RUNTIME)
        assert "\n" not in str(error.value)


def test_it_is_scored_with_its_own_tokens_and_its_begin_of_text(workspace):
    with inside(workspace):
        teacher = config_of(workspace).at.teacher
        candidate = load_pipeline_model("teacher", teacher, torch.float32)
        assert candidate.tokenizer.fingerprint == teacher_source(teacher).tokenizer().fingerprint
    assert candidate.begin == (1,) and candidate.start_token == 1
    question = Question("made_up", "0", "0", 0, "A dog is", (" red", " old"), (3, 3), "", ())
    (encoded,) = encode([question], candidate.tokenizer, 64, 1, begin=candidate.begin).questions
    assert encoded.context.tolist() == [1, *candidate.tokenizer.encode_as_it_is("A dog is").tolist()]
    for ending, ids in zip(question.endings, encoded.endings):
        (whole,) = candidate.tokenizer.encode_batch([f"A dog is{ending}"])
        assert ids.tolist() == whole[len(encoded.context) - 1 :].tolist()


def test_gemma_is_refused_for_a_start_out_of_a_teacher_before_anything_is_read(workspace):
    with inside(workspace):
        at = config_of(workspace).at
    at, told = replace(at, teacher=replace(at.teacher, model="gemma3-270m")), "reads SentencePiece's tokens"
    check_start("fresh", at)
    for kind in ("pruned", "embedding"):
        with pytest.raises(UserError, match=rf"teacher.model: gemma3-270m {told}.*\({kind}\)") as error:
            check_start(kind, at)
        assert "\n" not in str(error.value) and "set start to fresh" in str(error.value)
