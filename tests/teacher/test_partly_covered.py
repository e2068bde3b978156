"""Positions without a teacher: cross-entropy alone, in every objective, exactly; and stages from capture to verify."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microlm.corpus.batches import cached_windows, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import read_json, sha256_file, write_json
from microlm.models.teacher_source import teacher_source
from microlm.objective.fused_head import Objective, SparseTeacher, fused_head_loss
from microlm.pipeline.asked_objective import objective_schedule
from microlm.pipeline.capture import CACHE, capture_teacher
from microlm.pipeline.select import select_windows
from microlm.pipeline.start import fresh_student
from microlm.teacher.cache import MANIFEST, TeacherCache, cache_identity, sealed
from microlm.teacher.recorders import load_fitting_teacher
from microlm.training import losses
from tests.objective.test_objective import ALL, PADDED, TAILS, V, dense_divergence, problem
from tests.support.other_tokenizers import first_merges, write_teacher
from tests.support.toy_records import cached_records, read_block, write_block
from tests.support.workspace import RUNTIME, config_of, inside, make_workspace, short_tokenizer, verify


@settings(max_examples=80)
@given(
    divergence=st.sampled_from(ALL),
    tail=st.sampled_from(TAILS),
    temperature=st.sampled_from([1.0, 2.5]),
    alpha=st.floats(0.01, 1),
    z_loss=st.sampled_from([0.0, 1e-2]),
    seed=st.integers(0, 2**31),
    mark=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_uncovered_positions_have_cross_entropy_alone(divergence, tail, temperature, alpha, z_loss, seed, mark):
    hidden, weight, targets, teacher = problem(seed, 6, temperature)
    covered = torch.tensor(mark)
    garbage = torch.where(covered[:, None], teacher.log_p, torch.nan)  # as an uncovered record has it
    marked = SparseTeacher(teacher.ids * covered[:, None], garbage, teacher.log_table, covered)
    objective = Objective(1 - alpha, alpha * temperature**2, divergence, temperature, tail, z_loss)
    z = hidden @ weight[: weight.shape[0] - (PADDED - V)].T
    nats = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    said = dense_divergence(z[covered], teacher.of(covered), objective) if covered.any() else torch.zeros(())
    weights = torch.where(covered, nats.new_tensor(objective.ce_weight), nats.new_tensor(1.0))
    expected = (weights * nats).sum() + objective.kd_weight * said + z_loss * z.logsumexp(-1).square().sum()
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    ours = fused_head_loss(hidden, weight, targets, V, objective, marked, 7)
    got = torch.autograd.grad(ours.loss, (hidden, weight))
    torch.testing.assert_close(ours.loss.detach(), (expected / 7).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.cross_entropy, nats.sum().detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.divergence.double(), said.detach().double(), rtol=1e-8, atol=1e-9)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: d.name)
def test_a_mark_everywhere_is_no_mark_bit_for_bit_and_nowhere_is_cross_entropy(divergence):
    hidden, weight, targets, teacher = problem(3, 4)
    objective = Objective(0.4, 0.6, divergence)

    def gradients(wanted: Objective, said: SparseTeacher | None) -> list[torch.Tensor]:
        h, w = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
        loss = fused_head_loss(h, w, targets, V, wanted, said, 7)
        return [loss.loss.detach(), loss.divergence, *torch.autograd.grad(loss.loss, (h, w))]

    for mark, (wanted, said) in ((True, (objective, teacher)), (False, (Objective(), None))):
        marked = replace(teacher, covered=torch.full((len(targets),), mark))
        assert all(torch.equal(a, b) for a, b in zip(gradients(objective, marked), gradients(wanted, said)))


def with_other_tokenizer(top: Path) -> None:
    """Give the workspace a teacher of the same bytes in other tokens: its tokenizer without the last merges."""
    write_teacher(top / "other-teacher", "llama", first_merges(short_tokenizer(), 600), padding=31)
    params = (top / "params.yaml").read_text()
    (top / "params.yaml").write_text(re.sub(r"model: data/tiny-teacher", "model: other-teacher", params))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished capture under a teacher with another tokenizer."""
    top = make_workspace(tmp_path_factory.mktemp("projected") / "workspace")
    with_other_tokenizer(top)
    with inside(top):
        capture_teacher(config_of(top), RUNTIME)
    return top


def open_cache(top: Path) -> tuple[TokenShards, np.ndarray, TeacherCache]:
    config, shards = config_of(top), TokenShards(Path("data/shards"), "train")
    windows = cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows)
    return (
        shards,
        windows,
        TeacherCache(CACHE, cache_identity(config.at.teacher, config.at.batch.seq_len, shards), windows),
    )


def test_the_manifest_names_both_tokenizers_and_the_metrics_what_is_covered(workspace):
    with inside(workspace):
        shards, windows, cache = open_cache(workspace)
        records, told = cached_records(cache, windows), read_json("metrics/teacher.json", "teacher")
        assert cache.manifest["tokenizer"] == shards.manifest["tokenizer"]["fingerprint"]
        assert cache.manifest["teacher_tokenizer"] not in (None, cache.manifest["tokenizer"])
        assert told["coverage"] == pytest.approx(records["covered"].mean()) and 0.5 < told["coverage"] < 1
        projected = told["val_projected"]
        assert 0.5 < projected["coverage"] <= projected["shared_boundaries"] < 1
        assert projected["bpb"] > 0 and told["val"]["bpb"] > 0
        assert told["train"]["nats"] == pytest.approx(-records["gold"][records["covered"]].mean())
        teacher = cache.of_batch(read_batch(shards, windows[:2], 64), 2.5)
        assert torch.equal(teacher.covered, torch.from_numpy(records["covered"][:2].ravel()))
        mass = teacher.log_p[teacher.covered].exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=0)
        assert read_batch(shards, windows[:2], 64).targets.numel() == len(teacher.covered)


def test_a_reader_that_knows_another_tokenizer_of_the_teachers_refuses(workspace):
    with inside(workspace):
        _, windows, cache = open_cache(workspace)
        with pytest.raises(UserError, match=r"manifest.json: teacher_tokenizer is .*, but this run has 'another'"):
            TeacherCache(CACHE, replace(cache.identity, teacher_tokenizer="another"), windows)


def test_what_needs_one_tokenizer_says_so(workspace):
    with inside(workspace):
        config = config_of(workspace)
        select_windows(config, RUNTIME)
        with pytest.raises(UserError, match=r"another tokenizer|has \d+ tokens, data/shards") as error:
            load_fitting_teacher(teacher_source(config.at.teacher), open_cache(workspace)[2].identity, RUNTIME)
        assert "only stage `teacher` reads another tokenizer" in str(error.value) and "\n" not in str(error.value)
        difference = replace(config.at.continuation, windows="difference")
        with pytest.raises(UserError, match=r"continuation.windows: difference .* covers only some"):
            select_windows(replace(config, at=replace(config.at, continuation=difference)), RUNTIME)


def test_verify_replays_projected_records_and_refuses_other_ones(workspace, capsys):
    assert verify(workspace, "--windows", "6") == 0
    assert verify(workspace, "--windows", "6", "--teacher", "data/tiny-teacher", "--replay-only") == 1
    assert "teacher_tokenizer is" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["gold", "log_p", "log_tail", "ids", "covered"])
def test_verify_finds_a_projected_record_made_wrong(workspace, field, tmp_path, capsys):
    block = workspace / CACHE / "block-00000.bin"
    whole, manifest = block.read_bytes(), (workspace / CACHE / MANIFEST).read_text()
    try:
        with inside(workspace):
            identity = open_cache(workspace)[2].identity
        records = read_block(block, identity)
        records[field] = ~records[field] if field == "covered" else np.roll(records[field], 1, axis=0)
        write_block(block, records, identity)
        changed = json.loads(manifest)
        changed["blocks"] = [{"file": block.name, "sha256": sha256_file(block)}]
        write_json(workspace / CACHE / MANIFEST, sealed(changed))
        assert verify(workspace, "--windows", "4") == 1
        assert "other-teacher differs in" in capsys.readouterr().err
    finally:
        block.write_bytes(whole)
        (workspace / CACHE / MANIFEST).write_text(manifest)


def test_a_step_of_distillation_from_a_partly_covered_cache_is_finite(workspace):
    with inside(workspace):
        config = config_of(workspace)
        shards, windows, cache = open_cache(workspace)
        model = fresh_student(config, short_tokenizer())
        batch = read_batch(shards, windows[:4], config.at.batch.seq_len)
        loss = losses.Distillation(model.n_vocab, objective_schedule(config), cache)
        part = loss(model.hidden(batch.tokens).flatten(0, 1), model.head_weight, batch, batch.targets.numel(), 0.5)
        part.loss.backward()
        assert torch.isfinite(part.loss) and torch.isfinite(model.head_weight.grad).all()
