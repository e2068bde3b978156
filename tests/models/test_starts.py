"""First weights out of the teacher: what is cut away, what stays, and what such a student is to everybody else."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from microlm.corpus.batches import Batch
from microlm.errors import UserError
from microlm.models.architecture import FAMILIES
from microlm.models.model_files import as_student, load_student, save_student
from microlm.models.pruning import Kept, by_loss, cut, importance, most_important, principal_embedding, tries
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel
from microlm.objective.fused_head import token_nats

VOCABULARY, REAL, CONTEXT = 96, 90, 64
TOKENIZER = SimpleNamespace(eot_id=0, save=lambda folder, model_max_length: None)
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
HALF_TURNED = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**BASE, head_dim=8),
    "llama 3": LlamaConfig(
        **BASE,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32},
    ),
    "mistral": MistralConfig(**BASE, head_dim=8, sliding_window=32),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE, head_dim=16),
    "olmo2": Olmo2Config(**BASE),
}


def network_of(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """Random, with biases and gains of their own too."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def teacher_of(name: str, seed: int = 0) -> StudentLM:
    return as_student(TransformersModel(network_of(CONFIGS[name], seed), REAL), name).eval()


def everything(model: StudentLM) -> Kept:
    """What leaves the model as it is."""
    shape = model.shape
    groups, neurons = torch.arange(shape.kv_heads), torch.arange(shape.intermediate_size)
    layers = tuple(range(shape.layers))
    return Kept(layers, torch.arange(shape.hidden_size), (groups,) * shape.layers, (neurons,) * shape.layers)


def tokens(rows: int = 2, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, REAL, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: StudentLM, seen: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(seen))


def batch_of(seen: torch.Tensor) -> Batch:
    return Batch(np.arange(len(seen)), seen)


def test_every_family_is_tried() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_width_and_depth_has_the_teachers_logits(name: str) -> None:
    network = network_of(CONFIGS[name])
    model = as_student(TransformersModel(network, REAL), name).eval()
    whole = cut(model, everything(model)).eval()
    with torch.no_grad():
        theirs = network(tokens()).logits[..., :REAL]
    assert (logits(whole, tokens()) - theirs).abs().max() < 1e-4
    assert whole.parameter_count() == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_pruned_student_is_saved_as_what_it_is(name: str, tmp_path: Path) -> None:
    model = teacher_of(name)
    kept = Kept((0, 2), torch.arange(1, 43), (torch.tensor([1]), torch.tensor([0])), (torch.arange(64),) * 2)
    student = cut(model, kept).eval()
    save_student(student, TOKENIZER, tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert type(loaded) is type(network_of(CONFIGS[name]))
    with torch.no_grad():
        theirs = loaded(tokens()).logits[..., :REAL]
    assert (logits(student, tokens()) - theirs).abs().max() < 1e-4
    again = load_student(tmp_path / "student")
    assert asdict(again.shape) == asdict(student.shape)
    assert torch.equal(logits(again.eval(), tokens()), logits(student, tokens()))


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_read_after_a_prefix_are_those_of_the_whole(name: str) -> None:
    """What the evaluator lives on: grouped heads keep fewer keys than queries."""
    model, seen = teacher_of(name), tokens()
    with torch.no_grad():
        whole = model.hidden(seen)
        after = model.hidden(seen[:, 10:], prefix=model.read_prefix(seen[:, :10]))
        first, cache = model.extend(seen[:, :10])
        then, _ = model.extend(seen[:, 10:], cache)
    assert torch.allclose(after, whole[:, 10:], atol=1e-5)
    assert torch.allclose(torch.cat((first, then), 1), whole, atol=1e-5)


def _silence_layer(model: StudentLM, layer: int) -> None:
    block = model.model.layers[layer]
    if model.shape.kind.post_norm:
        last = (block.post_attention_layernorm, block.post_feedforward_layernorm)
    else:
        last = (block.self_attn.o_proj, block.mlp.down_proj)
    for module in last:
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 99), layer=st.integers(0, 2), group=st.integers(0, 1), width=st.integers(8, 79))
@settings(max_examples=4, deadline=None)
def test_what_says_nothing_can_be_cut(name: str, seed: int, layer: int, group: int, width: int) -> None:
    """A layer, a group of heads and neurons that add nothing leave the logits when they are cut."""
    model, drawn = teacher_of(name, seed), torch.Generator().manual_seed(seed)
    shape = model.shape
    each, neurons = shape.query_width // shape.kv_heads, torch.randperm(shape.intermediate_size, generator=drawn)
    silent, kept_neurons = neurons[width:], neurons[:width].sort().values
    with torch.no_grad():
        _silence_layer(model, layer)
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:, group * each : (group + 1) * each] = 0
            block.mlp.down_proj.weight[:, silent] = 0
    layers = tuple(i for i in range(shape.layers) if i != layer)
    kept = replace(
        everything(model),
        layers=layers,
        groups=(torch.tensor([1 - group]),) * 2 if shape.kind.qk_norm != "whole" else everything(model).groups[:2],
        neurons=(kept_neurons,) * 2,
    )
    assert torch.allclose(logits(cut(model, kept), tokens()), logits(model, tokens()), atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_dimensions_of_the_residual_stream_that_are_empty_can_be_cut(name: str) -> None:
    """Over fewer dimensions the root of the mean square, which norms divide by, is larger by sqrt(D / d)."""
    model, chosen = teacher_of(name), torch.tensor([*range(5), *range(9, 48)])
    empty = [i for i in range(48) if i not in chosen.tolist()]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, empty] = 0
        for block in model.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight[empty] = 0
    student = cut(model, replace(everything(model), hidden=chosen))
    with torch.no_grad():
        for parameter_name, parameter in student.named_parameters():
            if "layernorm" in parameter_name or parameter_name == "model.norm.weight":
                parameter.mul_((48 / len(chosen)) ** 0.5)
    assert torch.allclose(logits(student, tokens()), logits(model, tokens()), atol=1e-4)


def test_importance_is_what_the_network_does_by_hand() -> None:
    model, seen = teacher_of("llama"), tokens(3, 17)
    found = importance(model, batch_of(seen))
    network = network_of(CONFIGS["llama"])
    states: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: states.update({name: output, f"{name}.in": inputs[0]})

    for name, module in network.named_modules():
        if name.endswith(("o_proj", "down_proj", "norm")):
            module.register_forward_hook(keep(name))
    with torch.no_grad():
        hidden = network.model(seen[:, :-1], output_hidden_states=True).hidden_states
    turned = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(hidden[:3])]
    assert torch.allclose(found.layers[:2].float(), torch.stack(turned), atol=1e-5)
    norms = [state for name, state in states.items() if name.endswith("norm")]
    assert len(norms) == 7
    assert torch.allclose(found.hidden.float(), sum(state.abs().mean((0, 1)) for state in norms), atol=1e-4)
    for layer in range(3):
        heads = states[f"model.layers.{layer}.self_attn.o_proj.in"].unflatten(-1, (6, 8)).norm(dim=-1).mean((0, 1))
        assert torch.allclose(found.groups[layer].float(), heads.view(2, 3).sum(1), atol=1e-5)
        neurons = states[f"model.layers.{layer}.mlp.down_proj.in"].abs().mean((0, 1))
        assert torch.allclose(found.neurons[layer].float(), neurons, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_layers_go_by_the_loss_without_them(name: str) -> None:
    """Against cutting the model anew for every try."""
    model, seen, asked = teacher_of(name), tokens(2, 20), []
    left, removed = by_loss(model, batch_of(seen), 1, token_nats, asked.append)
    whole = everything(model)

    def loss(layers: list[int]) -> float:
        part = replace(
            whole,
            layers=tuple(layers),
            groups=tuple(whole.groups[i] for i in layers),
            neurons=tuple(whole.neurons[i] for i in layers),
        )
        scores = logits(cut(model, part), seen[:, :-1])
        return nn.functional.cross_entropy(scores.flatten(0, 1), seen[:, 1:].flatten()).item()

    here = [0, 1, 2]
    for gone, said in removed:
        losses = {layer: loss([i for i in here if i != layer]) for layer in here}
        assert losses[gone] == min(losses.values()) == pytest.approx(said, abs=1e-4)
        here.remove(gone)
    assert list(left) == here and len(removed) == 2 and sum(asked) == tries(3, 1) == 5


def test_the_most_important_are_kept_in_their_order() -> None:
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])
    assert most_important(scores, 2).tolist() == [0, 2]  # among equals the first
    assert most_important(scores, 4).tolist() == [0, 2, 3, 4]
    assert most_important(scores, 5).tolist() == [0, 1, 2, 3, 4]


@given(seed=st.integers(0, 999), size=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_principal_embedding_keeps_inner_products_as_well_as_possible(seed: int, size: int) -> None:
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) + 0.5
    found, share = principal_embedding(rows, size)
    lengths = torch.linalg.svdvals(rows.double())
    error = (rows @ rows.T - found @ found.T).double().norm()
    assert found.shape == (40, size)
    assert error == pytest.approx(float(lengths[size:].pow(4).sum().sqrt()), abs=1e-3)
    assert share == pytest.approx(float(lengths[:size].square().sum() / lengths.square().sum()), abs=1e-9)
    assert torch.allclose(principal_embedding(-rows, size)[0], -found, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            GPT2Config(n_embd=48, n_head=6, n_layer=2, vocab_size=VOCABULARY),
            "is of architecture 'gpt2', and only llama",
        ),
        (LlamaConfig(**BASE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "'linear'"),
        (LlamaConfig(**BASE, hidden_act="gelu"), "has hidden_act 'gelu', which a student here cannot have"),
        (LlamaConfig(**BASE, rope_parameters=HALF_TURNED), "a partial rotation"),
    ],
)
def test_what_is_no_member_of_the_family_is_refused_in_one_line(config: PreTrainedConfig, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        as_student(TransformersModel(AutoModelForCausalLM.from_config(config), REAL), "folder/teacher")
    assert "\n" not in str(caught.value) and "start: fresh" in str(caught.value)
    assert str(caught.value).startswith("folder/teacher: ")


def test_config_of_a_saved_student_names_its_class(tmp_path: Path) -> None:
    save_student(teacher_of("mistral"), TOKENIZER, tmp_path / "student")
    said = json.loads((tmp_path / "student" / "config.json").read_text())
    assert said["architectures"] == ["MistralForCausalLM"] and said["max_position_embeddings"] == 32
