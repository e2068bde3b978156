"""The probe: closed-form gradients against autograd, unbiased samples, true bounds, honest bytes."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Generator, Tensor

from microlm.config import load_config
from microlm.errors import UserError
from microlm.files import write_json
from microlm.models.architecture import ModelShape, config_of
from microlm.models.student import StudentLM
from microlm.research.probe import closed_form_gradients
from microlm.research.probe import measure as measure_module
from microlm.research.probe import methods as m
from microlm.research.probe.closed_form_gradients import (
    RowGradient,
    Target,
    cap,
    forward_kl,
    forward_upper_bound,
    reverse_kl,
    terms,
)
from microlm.research.probe.dense_positions import DensePositions, TailModel
from microlm.research.probe.measure import CountSketch, Probe
from microlm.research.probe.methods import METHODS
from microlm.research.probe.run import at_budget, probe
from microlm.runtime.device import set_up
from microlm.teacher.cache import CacheIdentity
from tests.conftest import ROOT
from tests.support.dense_tails import cap_tail, lump, table_tail
from tests.support.toy import toy_shards

N, V, D = 5, 40, 6
BY_NAME = {method.name: method for method in METHODS}


@dataclasses.dataclass
class Scene:
    at: DensePositions
    logits: Tensor  # the student's, [N, V]
    teacher_logits: Tensor
    teacher_hidden: Tensor
    tails: TailModel


def scene(seed: int, sharpness: float = 2.0) -> Scene:
    draws = Generator().manual_seed(seed)
    hidden, weight = torch.randn(200, D, generator=draws), sharpness * torch.randn(V, D, generator=draws) / D**0.5
    teacher = (hidden[:N] @ weight.T).double()
    logits = torch.randn(N, V, generator=draws, dtype=torch.float64) * sharpness
    tails = TailModel.fit(hidden, weight)
    at = DensePositions(teacher.log_softmax(-1), logits.log_softmax(-1), hidden[:N], tails)
    return Scene(at, logits, teacher, hidden[:N], tails)


def draws(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def dense_log_target(target: Target, at: DensePositions) -> Tensor:
    dense = target.log_c[:, None] + at.shape(target.shape).log_f
    for row in range(len(dense)):
        dense[row, target.ids[row, target.listed[row]]] = target.log_p[row, target.listed[row]]
    return dense


def whole(row: RowGradient, target: Target, at: DensePositions) -> Tensor:
    """The gradient at every id, [N, V]."""
    dense = torch.cat((terms(at, "student"), terms(at, target.shape)), 1)
    everywhere = torch.einsum("nt,ntv->nv", row.coefficients, dense)
    rows = torch.arange(len(at.log_q))[:, None].expand_as(target.ids)
    everywhere[rows[target.listed], target.ids[target.listed]] = row.entries[target.listed]
    return everywhere


def plain_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a log(a / b) with 0 log 0 = 0, of possibly unnormalized a."""
    kept = log_a > -torch.inf
    safe = torch.where(kept, log_a, 0.0)
    return torch.where(kept, safe.exp() * (safe - torch.where(kept, log_b, 0.0)), 0.0).sum(-1)


def by_autograd(name: str, target: Target, now: Scene) -> tuple[Tensor, Tensor]:
    """Value [N] and gradient [N, V] of the loss as its system writes it, over the whole vocabulary."""
    logits = now.logits.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    log_t = dense_log_target(target, now.at).detach()
    listed = torch.zeros_like(log_t, dtype=torch.bool)
    for row in range(len(log_t)):
        listed[row, target.ids[row, target.listed[row]]] = True
    hidden_q = log_q.masked_fill(~listed, -torch.inf)
    among_q, among_t = hidden_q.log_softmax(-1), log_t.masked_fill(~listed, -torch.inf).log_softmax(-1)
    value = {
        "forward_kl": lambda: plain_kl(log_t, log_q),
        "reverse_kl": lambda: plain_kl(log_q, log_t),
        "conditional_reverse_kl": lambda: plain_kl(among_q, among_t),
        "dropped_reverse_kl": lambda: plain_kl(hidden_q, log_t),
    }[name]()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


CASES = [(method.name, direction) for method in METHODS for direction in method.read]


@pytest.mark.parametrize(("name", "direction"), CASES)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_every_closed_form_is_the_gradient_of_its_loss(name, direction, k):
    method, now = BY_NAME[name], scene(k)
    target = method.keep(now.at, k, draws())
    row = method.read[direction](target, now.at)
    value, gradient = by_autograd(method.read[direction].__name__, target, now)
    torch.testing.assert_close(row.value, value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole(row, target, now.at), gradient, rtol=1e-8, atol=1e-10)


def test_exact_gradients_are_those_of_the_dense_divergences():
    now = scene(1)
    for direction, (value, gradient) in now.at.exact.items():
        logits = now.logits.clone().requires_grad_()
        log_q, log_p = logits.log_softmax(-1), now.at.log_p
        dense = plain_kl(log_p, log_q) if direction == "forward" else plain_kl(log_q, log_p)
        torch.testing.assert_close(value, dense.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(dense.sum(), logits)[0])


def exact_head(at: DensePositions, k: int, shape: str = "student") -> Target:
    return m.completed(at, at.ranked_log_p[:, :k], lump(at.log_p, at.ranked_ids[:, :k])[:, -1], shape)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, V - 1), st.sampled_from([0.5, 1.0, 3.0]))
def test_the_cap_is_the_oracles_and_its_bounds_hold(seed, k, sharpness):
    at = scene(seed, sharpness).at
    lumped = exact_head(at, k)
    capped = cap(lumped, at, width=2)
    oracle = cap_tail(lump(at.log_p, lumped.ids), lumped.ids, at.log_q)
    torch.testing.assert_close(dense_log_target(capped, at).exp(), oracle.exp(), rtol=1e-2, atol=1e-12)
    torch.testing.assert_close(dense_log_target(capped, at).exp(), oracle.exp(), rtol=1e-6, atol=1e-9)
    upper = forward_upper_bound(lumped, k, at)
    for read, direction in ((forward_kl, "forward"), (reverse_kl, "reverse")):
        exact, low, high = at.exact[direction][0], read(lumped, at).value, read(capped, at).value
        assert (low >= -1e-9).all() and (low <= high + 1e-7).all() and (high <= exact + 1e-7).all()
    assert (at.exact["forward"][0] <= upper + 1e-9).all()


def test_a_cache_of_the_whole_vocabulary_loses_nothing():
    now = scene(2)
    measured = Probe(now.tails, D, 0, ks=(V,), methods=exact_methods())
    measured.add(now.teacher_logits, now.logits, now.teacher_hidden, torch.randn(N, D, generator=draws()))
    table = measured.table()
    assert len(table) == 7 and (table["relative_error"] < 1e-7).all()
    assert (table["step_error"] < 1e-6).all()
    assert table["value"].to_numpy() == pytest.approx(table["exact_value"].to_numpy(), rel=1e-9)


def test_positions_that_fill_no_step_count_in_the_whole(monkeypatch):
    monkeypatch.setattr(measure_module, "STEP_POSITIONS", N)
    now, hidden = scene(2), torch.randn(N, D, generator=draws())
    measured = Probe(now.tails, D, 0, ks=(4,), methods=(BY_NAME["capped"],))
    with torch.inference_mode():  # as the probe adds them
        for rows in (slice(None), slice(2)):
            measured.add(*(values[rows] for values in (now.teacher_logits, now.logits, now.teacher_hidden, hidden)))
    row = measured.table().iloc[0]
    assert measured.positions == N + 2
    assert row["step_error"] != row["whole_error"]


def exact_methods() -> tuple[m.Method, ...]:
    """Methods on an unquantized head: at k = V they are exact."""
    both, size = {"forward": forward_kl, "reverse": reverse_kl}, lambda k, _: 4 * k
    return (
        m.Method("lumped", "", lambda at, k, _: exact_head(at, k), size, both),
        m.Method("capped", "", lambda at, k, _: cap(exact_head(at, k), at), size, both),
        m.Method("table", "", lambda at, k, _: cap(exact_head(at, k, "table"), at), size, both),
        m.Method("renormalized", "", m.renormalized, size, {"forward": forward_kl}),
    )


@pytest.mark.parametrize(("name", "direction"), CASES)
def test_measured_errors_are_those_of_the_whole_gradients(name, direction):
    now, method = scene(3), BY_NAME[name]
    hidden = torch.randn(N, D, generator=draws())
    measured = Probe(now.tails, D, 7, ks=(4,), methods=(dataclasses.replace(method, ks=None),))
    measured.add(now.teacher_logits, now.logits, now.teacher_hidden, hidden)
    got = measured.table().set_index("direction").loc[direction]
    target = method.keep(now.at, 4, draws(7))
    row, exact = method.read[direction](target, now.at), now.at.exact[direction][1]
    gradient = whole(row, target, now.at)
    error = gradient - exact
    assert got["relative_error"] == pytest.approx(float((error.norm(dim=-1) / exact.norm(dim=-1)).mean()), rel=1e-7)
    assert got["cosine"] == pytest.approx(float(torch.cosine_similarity(gradient, exact).mean()), rel=1e-7)
    # V is below the sketch's width: no two tokens share a bucket
    step = (error.T.float() @ hidden).norm() / (exact.T.float() @ hidden).norm()
    assert got["step_error"] == pytest.approx(float(step), rel=1e-4)
    assert got["whole_error"] == pytest.approx(float(step), rel=1e-4)


def test_a_folded_gradient_keeps_its_norm_on_average():
    rows, hidden = torch.randn(20, 3000, generator=draws(), dtype=torch.float64), torch.randn(20, 8, generator=draws())
    norms = [
        float((sketch.fold(rows).T.float() @ sketch.project(hidden)).square().sum())
        for sketch in (CountSketch(3000, 8, seed, torch.device("cpu")) for seed in range(200))
    ]
    error = np.std(norms) / math.sqrt(len(norms))
    assert abs(np.mean(norms) - float((rows.T.float() @ hidden).square().sum())) < 4 * error


@pytest.mark.parametrize("name", ["random sampling", "threshold sampling", "head + samples"])
def test_sampled_targets_are_the_teacher_on_average(name):
    at, rounds = scene(4, sharpness=1.0).at, 1500
    generator, total, squares = draws(), torch.zeros(N, V), torch.zeros(N, V)
    for _ in range(rounds):
        dense = dense_log_target(BY_NAME[name].keep(at, 6, generator), at).exp()
        total += dense
        squares += dense.square()
    mean = total / rounds
    error = ((squares / rounds - mean.square()).clamp_min(0) / rounds).sqrt()
    assert ((mean - at.log_p.exp()).abs() <= 5 * error + 1e-3 * at.log_p.exp() + 1e-4).all()  # float16 in the head


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, V - 1))
def test_threshold_sampling_has_n_entries_and_keeps_the_mass(seed, n):
    target = m.threshold_sampling(scene(seed).at, n, draws(seed))
    assert all(len(set(row.tolist())) == n for row in target.ids)
    torch.testing.assert_close(target.mass().sum(-1), torch.ones(N, dtype=torch.float64))


def test_bytes_are_those_of_the_layouts():
    identity = CacheIdentity("", None, "", V, "", 1, 1, top_k=16, temperatures=(1.0,))
    sizes = {method.name: method.token_bytes(16, 12.0) for method in METHODS}
    assert sizes["lumped"] == sizes["capped"] == identity.token_bytes
    assert sizes["head + samples"] == identity.token_bytes + 16 * 2
    compact = np.dtype([("ids", "<u2", 16), ("drop", "u1", 16), ("tail", "<f4"), ("gold", "<f4")])
    assert sizes["compact capped"] == sizes["compact table tail"] == compact.itemsize
    assert sizes["code tail"] == compact.itemsize + 32
    assert sizes["random sampling"] == 36 and sizes["ghost token"] == 80
    assert [BY_NAME["renormalized"].token_bytes(k, 0.0) for k in (50, 128)] == [114, 312]


def test_the_tables_target_is_what_training_reads():
    at = scene(6).at
    target = exact_head(at, 8, "table")
    oracle = table_tail(lump(at.log_p, target.ids), target.ids, at.shape("table").log_f[0])
    torch.testing.assert_close(dense_log_target(target, at), oracle, rtol=1e-9, atol=1e-9)


def test_a_code_of_more_directions_is_nearer_to_the_teacher():
    now = scene(5)
    apart = [
        float((now.tails.decoded(now.teacher_hidden, r) - now.at.log_p).square().mean()) for r in range(0, D + 1, 2)
    ]
    assert all(b < a for a, b in itertools.pairwise(apart))
    torch.testing.assert_close(now.tails.log_table.logsumexp(0), torch.tensor(0.0), rtol=0, atol=1e-5)


def test_budgets_lie_between_measured_points():
    rows = pd.DataFrame({"bytes": [16, 64], "relative_error": [0.4, 0.1], "cosine": [0.5, 0.9]})
    assert at_budget(rows, "relative_error", 32) == pytest.approx(0.2)
    assert at_budget(rows, "cosine", 32) == pytest.approx(0.7)
    assert at_budget(rows, "relative_error", 65) is None


def test_negative_and_blind_losses_of_peers_are_reproduced():
    log_p, log_q = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.6, 0.4]]).double().log()
    at = DensePositions(log_p, log_q)
    head = m.head_alone(at, 1, draws())
    assert float(closed_form_gradients.dropped_reverse_kl(head, at).value) == pytest.approx(
        0.6 * math.log(0.6 / 0.9)
    )  # verl#7806: -0.243
    assert float(closed_form_gradients.conditional_reverse_kl(head, at).value) == 0
    assert (whole(closed_form_gradients.conditional_reverse_kl(head, at), head, at) == 0).all()
    assert float(reverse_kl(m.floored(at, 1, draws()), at).value) > 39


def test_the_stage_refuses_without_control_or_teacher(tmp_path, monkeypatch):
    config = load_config(ROOT / "params.yaml")
    monkeypatch.chdir(tmp_path)
    runtime = set_up(dataclasses.replace(config.at.runtime, compile="off", threads=1))
    with pytest.raises(UserError, match=r"data/shards/manifest.json is not there; make it with: dvc repro tokenize"):
        probe(config, runtime)
    write_both_splits(tmp_path / "data" / "shards")
    with pytest.raises(UserError, match=r"models/control/config.json is not there; make it with: dvc repro pretrain"):
        probe(config, runtime)
    shape = ModelShape(
        V, 64, layers=1, hidden_size=8, heads=1, head_dim=8, intermediate_size=8, context=256, rope_theta=1e4
    )
    write_control(tmp_path / "models" / "control", StudentLM(shape))
    with pytest.raises(UserError, match=r"make it with: dvc repro fetch") as refused:
        probe(config, runtime)
    assert "\n" not in str(refused.value)


def write_control(folder: Path, model: StudentLM) -> None:
    folder.mkdir(parents=True)
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", config_of(model.shape, 0))


def write_both_splits(folder: Path) -> None:
    folder.mkdir(parents=True)
    train, val = (toy_shards(folder, V, tokens=5000, split=split).manifest for split in ("train", "val"))
    write_json(folder / "manifest.json", {**val, "splits": train["splits"] | val["splits"]})
