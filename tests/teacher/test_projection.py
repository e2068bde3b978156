"""A teacher of another tokenizer: what is covered, what its distribution becomes, and that nothing of it is lost."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import Batch, evenly_spaced, read_batch, window_count
from microlm.corpus.parts import WIKI, WIKI_SUMMARIES
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import END_OF_TEXT, Tokenizer
from microlm.models import teacher_source as teacher_sources
from microlm.models.model_files import TransformersModel
from microlm.models.teacher_source import teacher_source
from microlm.parameters import TeacherConfig
from microlm.teacher.cache import CacheIdentity, sparse_teacher
from microlm.teacher.capture import projected_loss
from microlm.teacher.projection import Projection, native_loss, spell, sum_sorted
from microlm.teacher.recorders import Recorder
from tests.support.other_tokenizers import first_merges, random_network, toy_tokenizer, write_teacher
from tests.support.packaged import gguf_parsed_once, packaged_tokenizer
from tests.support.toy_records import records_of
from tests.support.toy_shards import write_shards

CPU = torch.device("cpu")
NAMES = ("smollm2", "gpt2", "olmo")
TEMPERATURES = (1.0, 2.5, 0.5)
SPECIAL = (END_OF_TEXT, "<|im_end|>")
TEACHER = toy_tokenizer("teacher", ["ab", " a", " ab", "é", "bé"], SPECIAL)
STUDENT = toy_tokenizer("student", ["bc", "abc", " b", "cc", "é", "aé"])
PAIRS = [(TEACHER, STUDENT), (STUDENT, TEACHER), (TEACHER, TEACHER)]


def identity_of(student: Tokenizer, top_k: int, seq_len: int, teacher: Tokenizer | None) -> CacheIdentity:
    own = teacher.fingerprint if teacher else None
    identity = CacheIdentity("toy", None, student.fingerprint, student.n_vocab, "", seq_len, 1, top_k, TEMPERATURES)
    return replace(identity, teacher_tokenizer=own)


def batch_of(rows: list[list[int]]) -> Batch:
    whole = torch.tensor(rows)
    return Batch(np.arange(len(rows)), whole)


def content(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """Bytes, with one that is in no text for end-of-text."""
    return b"".join(b"\xff" if i == tokenizer.eot_id else tokenizer.bytes_of(i) for i in ids)


windows = st.lists(st.integers(0, STUDENT.n_vocab - 1), min_size=3, max_size=14)


@settings(max_examples=300)
@given(row=windows, pair=st.sampled_from(PAIRS[::2]), context=st.integers(2, 40))
def test_coverage_is_that_of_comparing_every_pair_of_prefixes(row, pair, context):
    teacher, student = pair
    row = [min(token, student.n_vocab - 1) for token in row]
    row = [student.eot_id if student.bytes_of(token) == b"" else token for token in row]
    projection = Projection(teacher, student, context)
    aligned = projection.align(batch_of([row]))
    read = [*aligned.tokens[0].tolist(), int(aligned.targets[0, -1])]
    text = content(student, row)
    assert text.startswith(content(teacher, read)) and len(read) <= context + 1
    states = iter(aligned.states.tolist())
    for i in range(len(row) - 1):
        before = content(student, row[: i + 1])
        places = [j for j in range(len(read) - 1) if content(teacher, read[: j + 1]) == before]
        assert aligned.shared[i] == bool(places)
        assert aligned.covered[i] == (bool(places) and projection.first[read[places[0] + 1]] == row[i + 1])
        if aligned.covered[i]:
            assert next(states) == places[0]
    assert next(states, None) is None


@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=("there", "back", "same"))
def test_first_tokens_are_those_of_the_spelled_bytes(teacher, student):
    first = Projection(teacher, student, 10).first
    for token in range(teacher.n_vocab):
        spelled = teacher.bytes_of(token)
        if not spelled:
            spellings = {i: name for name, i in teacher.special_tokens.items()}
            assert first[token] == student.special_tokens.get(spellings[token], student.eot_id)
            continue
        assert spelled.startswith(student.bytes_of(int(first[token])))
        if spelled.isascii():
            assert first[token] == student.encode(spelled.decode())[0]
    assert teacher is not student or first.tolist() == list(range(teacher.n_vocab))


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 60), wanted=st.integers(1, 40), rows=st.integers(1, 4))
def test_sums_in_a_fixed_order_are_the_sums(seed, tokens, wanted, rows):
    # what a card does in place of index_add_, whose order there is chance
    generator = torch.Generator().manual_seed(seed)
    first, p = torch.randint(wanted, (tokens,), generator=generator), torch.rand(rows, tokens, generator=generator)
    order, counts = first.argsort(stable=True), first.bincount(minlength=wanted)
    expected = p.new_zeros(rows, wanted).index_add_(1, first, p)
    torch.testing.assert_close(sum_sorted(p, order, counts), expected, rtol=1e-6, atol=1e-7)


@given(st.data())
def test_pushing_forward_keeps_the_mass_and_enumerates_to_the_sums(data):
    teacher, student = data.draw(st.sampled_from(PAIRS))
    projection = Projection(teacher, student, 10)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    spread = data.draw(st.floats(0.1, 30))
    p = torch.softmax(spread * torch.randn(5, teacher.n_vocab, generator=generator, dtype=torch.float64), -1)
    pushed = projection.push(p)
    assert torch.allclose(pushed.sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-14, rtol=0)
    for row, token in itertools.product(range(5), range(student.n_vocab)):
        wanted = sum(float(p[row, t]) for t in range(teacher.n_vocab) if projection.first[t] == token)
        assert float(pushed[row, token]) == pytest.approx(wanted, rel=1e-12, abs=1e-300)


@settings(max_examples=40)
@given(
    rows=st.lists(st.lists(st.integers(0, 12), min_size=9, max_size=9), min_size=1, max_size=4), k=st.integers(1, 12)
)
def test_records_are_the_enumerated_projection_at_every_temperature(rows, k):
    rows = [[min(token, STUDENT.n_vocab - 1) for token in row] for row in rows]
    k = min(k, STUDENT.n_vocab)
    projection = Projection(TEACHER, STUDENT, 64)
    model = TransformersModel(random_network("llama", TEACHER.n_vocab + 5), TEACHER.n_vocab).eval()
    identity, batch = identity_of(STUDENT, k, 8, TEACHER), batch_of(rows)
    records = records_of(Recorder(model, identity, False, projection), batch)
    gold = batch.targets.flatten().tolist()
    aligned = projection.align(batch)
    assert (records["covered"] == aligned.covered).all()
    assert np.isnan(records["gold"][~aligned.covered]).all()
    with torch.no_grad():
        z = model.logits(model.hidden(aligned.tokens)).flatten(0, 1).double()
    for position, state in zip(np.flatnonzero(aligned.covered), aligned.states.tolist()):
        for column, temperature in enumerate(TEMPERATURES):
            p = torch.softmax(z[state] / temperature, -1).tolist()
            dense = [
                sum(p[t] for t in range(TEACHER.n_vocab) if projection.first[t] == j) for j in range(STUDENT.n_vocab)
            ]
            record = records[position]
            ids = record["ids"][column].tolist()
            assert len(set(ids)) == k
            head = np.array([dense[i] for i in ids])
            assert np.exp(record["log_p"][column].astype(float)) == pytest.approx(head, rel=1e-2, abs=1e-7)
            rest = [dense[j] for j in range(len(dense)) if j not in ids]
            assert not rest or max(rest) <= min(head) * 1.0001 + 1e-12
            if temperature > 0.5:
                assert np.exp(record["log_tail"][column]) == pytest.approx(sum(rest), rel=1e-3, abs=1e-7)
            if temperature == 1:
                assert np.exp(record["gold"]) == pytest.approx(dense[gold[position]], rel=1e-4)
                own = float(torch.log_softmax(z[state], -1)[aligned.targets.flatten()[state]])
                assert record["gold"] >= own - 1e-4  # never less than what the teacher gives its own next token


@pytest.fixture(scope="module")
def built(parts: Path) -> Iterator[dict[str, Tokenizer]]:
    with gguf_parsed_once():
        yield {name: packaged_tokenizer(name, parts) for name in NAMES}


@settings(max_examples=300)
@given(data=st.data())
def test_any_bytes_are_spelled(built, data):
    tokenizer = built[data.draw(st.sampled_from(NAMES))]
    raw = data.draw(st.binary(max_size=20) | st.text(max_size=20).map(str.encode))
    start, stop = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    raw = raw[start : len(raw) - stop]  # a window begins and ends anywhere in a character
    ids, ends = spell(tokenizer, raw)
    assert (np.diff(ends) > 0).all() and tokenizer.eot_id not in ids
    for token, end in zip(ids.tolist(), ends.tolist()):
        assert raw[:end].endswith(tokenizer.bytes_of(token))
    lacking = sum(1 for byte in raw if bytes([byte]) not in tokenizer._bytes)
    assert sum(len(tokenizer.bytes_of(token)) for token in ids.tolist()) == len(raw) - lacking


@pytest.mark.parametrize("name", NAMES)
def test_whole_texts_are_spelled_in_the_tokens_that_the_reference_gives(built, name):
    for text in ("Hello  world,\n\n 2019 is naïve; 日本語 |||IP_ADDRESS||| " + " " * 30, "x" * 50):
        assert spell(built[name], text.encode())[0].tolist() == built[name].encode(text)


@pytest.mark.parametrize(("teacher", "student"), list(itertools.permutations(NAMES, 2)))
def test_mass_is_kept_between_real_vocabularies(built, teacher, student):
    projection = Projection(built[teacher], built[student], 100)
    assert projection.first.min() >= 0 and projection.first.max() < built[student].n_vocab
    p = torch.softmax(5 * torch.randn(3, built[teacher].n_vocab, generator=torch.Generator().manual_seed(0)), -1)
    assert torch.allclose(projection.push(p).sum(-1), torch.ones(3), atol=1e-5)
    assert projection.first[built[teacher].eot_id] == built[student].eot_id


@pytest.fixture(scope="module")
def renamed(built: dict[str, Tokenizer]) -> tuple[TransformersModel, Projection, Tokenizer]:
    """A random teacher of GPT-2's first merges, and the way from that tokenizer under another name to itself."""
    student = first_merges(built["gpt2"], 2000)
    teacher = Tokenizer("another name", student._definition, "test")
    network = random_network("gpt2", student.n_vocab + 7, context=256)
    return TransformersModel(network, student.n_vocab).eval(), Projection(teacher, student, 256), student


@settings(max_examples=10)
@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=80, max_size=200))
def test_the_same_tokenizer_under_two_names_gives_the_plain_records(renamed, text):
    model, projection, student = renamed
    teacher, row = projection.teacher, [student.eot_id, *student.encode(text)]
    batch = batch_of([row[: len(row) // 2 * 2]])
    length = batch.tokens.shape[1]
    recorders = (
        Recorder(model, identity_of(student, 8, length, None), False),
        Recorder(model, identity_of(student, 8, length, teacher), False, projection),
    )
    plain, projected = (records_of(record, batch) for record in recorders)
    assert projected["covered"].all()
    assert projection.align(batch).tokens.tolist() == batch.tokens.tolist()
    assert (projected["ids"][:, 0] == plain["ids"]).mean() > 0.98  # equal logits may change places
    np.testing.assert_allclose(projected["log_p"][:, 0].astype(float), plain["log_p"].astype(float), rtol=2e-3)
    np.testing.assert_allclose(projected["gold"], plain["gold"], rtol=1e-4, atol=1e-4)
    tables = torch.zeros(len(TEMPERATURES), student.n_vocab)
    for temperature in TEMPERATURES[:2]:
        both = [
            sparse_teacher(record.labels(batch).rows, record.identity, tables, temperature).log_p
            for record in recorders
        ]
        torch.testing.assert_close(*both, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "olmo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_any_architecture_is_read_with_its_padding_left_out(built, kind, dtype, tmp_path):
    tokenizer = built["olmo"]
    network = write_teacher(tmp_path, kind, tokenizer, padding=24)
    config = TeacherConfig(str(tmp_path), None, "cache", "full", 8, [1.0], 1, 1)
    model = teacher_source(config).load(dtype)
    assert model.n_vocab == tokenizer.n_vocab == 50280 and len(model.head_weight) == 50304
    assert model.head_weight.dtype == dtype and model.network.config._attn_implementation == "sdpa"
    assert teacher_source(config).tokenizer().fingerprint == tokenizer.fingerprint
    ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode("The wall is long, naïve and 2019 years old.")]])
    batch = Batch(np.array([0]), ids)
    identity = replace(identity_of(tokenizer, 8, ids.shape[1] - 1, None), temperatures=(1.0,))
    records = records_of(Recorder(model, identity, False), batch)
    with torch.no_grad():
        log_p = torch.log_softmax(network.to(dtype)(ids[:, :-1]).logits[0, :, : tokenizer.n_vocab].float(), -1)
    gold = log_p.gather(1, batch.targets[0][:, None])[:, 0]
    close = 1e-3 if dtype == torch.float32 else 0.3
    np.testing.assert_allclose(records["gold"], gold, atol=close)
    assert (records["ids"] < tokenizer.n_vocab).all()


def test_the_real_teacher_covers_another_tokenizers_text_and_loses_little(built, parts, monkeypatch, tmp_path):
    """Measured over 12 windows of 128 tokens: 0.94 covered, 0.90 bits per byte projected, 0.96 native."""
    monkeypatch.setattr(teacher_sources, "part_file", lambda name, path: parts / name / path)
    config = TeacherConfig("packaged", None, "cache", "full", 64, [1.0, 2.5], 1, 1)
    model = teacher_source(config).load(torch.bfloat16)
    summaries = json.loads((parts / WIKI / WIKI_SUMMARIES).read_text())
    texts = [entry["extract"] for entry in list(summaries.values())[::200]]
    student = built["gpt2"]
    write_shards(texts, student, tmp_path / "shards", validation_fraction=0.1, shard_tokens=8192)
    shards = TokenShards(tmp_path / "shards", "train")
    chosen = evenly_spaced(window_count(shards, 128), 3)
    projection = Projection(teacher_source(config).tokenizer(), student, model.context)
    identity = replace(identity_of(student, 64, 128, projection.teacher), temperatures=(1.0, 2.5))
    record = Recorder(model, identity, False, projection)
    records = records_of(record, read_batch(shards, chosen, 128))
    said = records[records["covered"]]
    assert all(np.isfinite(said[name].astype(float)).all() for name in ("log_p", "log_tail", "gold"))
    mass = np.exp(said["log_p"].astype(float)).sum(-1) + np.exp(said["log_tail"].astype(float))
    np.testing.assert_allclose(mass, 1, atol=2e-3)
    loss, shared = projected_loss(record, shards, chosen, 4, student.byte_lengths)
    native = native_loss(model, projection, shards, 128, chosen, 4)
    assert len(said) / len(records) > 0.88 and shared > 0.93
    assert abs(loss.bpb - native.bpb) < 0.15 and 0.5 < native.bpb < 1.4
