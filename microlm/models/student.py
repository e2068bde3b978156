"""The student: a decoder-only transformer whose module tree and arithmetic are those of the llama family.

RMSNorm, rotary positions (half-split), SwiGLU; what sets a member of the family apart is in architecture.py. A fresh
student is a `Qwen3ForCausalLM`: per-head query/key norm before the rotation, no biases, tied embeddings. Exporting it
is saving its state dict (see model_files.py).

Precision: weights are float32; `hidden` computes in the dtype given to `set_activation_dtype`, each linear casting its
weight on the way; norms compute in float32.

Shapes: B rows, T positions, D hidden size, H heads of queries, K of keys and values, E head_dim, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microlm.models.architecture import ModelShape
from microlm.models.interface import KeysValues, LanguageModel, Prefix

INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * x32).to(x.dtype)


class Linear(nn.Linear):
    """A linear whose float32 weight is cast to the activations' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotary position embedding, half-split as in GPT-NeoX and Qwen3 (Su et al. 2021, arXiv:2104.09864)."""
    left, right = x_BHTE.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return x_BHTE * cos_BTE.unsqueeze(1) + turned * sin_BTE.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads, self.head_dim = shape.heads, shape.head_dim
        self.group = shape.heads // shape.kv_heads  # heads of queries that one of keys and values serves
        always = shape.kind.always_biased
        self.q_proj = Linear(shape.hidden_size, shape.query_width, shape.attention_bias or always)
        self.k_proj = Linear(shape.hidden_size, shape.key_width, shape.attention_bias or always)
        self.v_proj = Linear(shape.hidden_size, shape.key_width, shape.attention_bias or always)
        self.o_proj = Linear(shape.query_width, shape.hidden_size, shape.attention_bias and not always)
        self.qk_norm = shape.kind.qk_norm
        if self.qk_norm != "none":
            whole = self.qk_norm == "whole"
            self.q_norm = RMSNorm(shape.query_width if whole else shape.head_dim, shape.norm_eps)
            self.k_norm = RMSNorm(shape.key_width if whole else shape.head_dim, shape.norm_eps)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        """What positions that follow those of `past` attend, and the keys and values [B, K, T, E] of both together."""
        q, k = self.q_proj(x_BTD), self.k_proj(x_BTD)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, self.v_proj(x_BTD)))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        kept = k, v
        # a mask keeps a GPU from its flash kernel: without a past `is_causal` says the same; one query sees all keys
        causal = mask is None and past is None
        if mask is None and not causal and q.shape[2] > 1:
            before = k.shape[2] - q.shape[2]
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        if self.group > 1:
            # repeated by hand: with `enable_gqa` the CPU leaves its flash kernel
            k, v = k.repeat_interleave(self.group, dim=1), v.repeat_interleave(self.group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2)), kept


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, shape.mlp_bias)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, shape.mlp_bias)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.post_norm = shape.kind.post_norm
        if not self.post_norm:
            self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        if self.post_norm:
            self.post_feedforward_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        return self.extend(x, cos, sin, None, mask)[0]

    def extend(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: KeysValues | None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeysValues]:
        before = x if self.post_norm else self.input_layernorm(x)
        attended, kept = self.self_attn(before, cos, sin, past, mask)
        if self.post_norm:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self.mlp(x)), kept
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class Trunk(nn.Module):
    """Everything below the LM head; named `model` in the tree, as Hugging Face does."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.padded_vocab, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)


class StudentLM(LanguageModel):
    """The student. `hidden` and `logits` are apart, so that the loss and the scorers choose where the head runs."""

    plain_head = True

    def __init__(self, shape: ModelShape, seed: int | None = 0) -> None:
        """`seed` of the first weights; None leaves them to whoever loads others."""
        super().__init__()
        self.shape, self.n_vocab, self.context = shape, shape.n_vocab, shape.context
        self.activation_dtype = torch.float32
        self.model = Trunk(shape)
        if not shape.tied:
            self.lm_head = Linear(shape.hidden_size, shape.padded_vocab, bias=False)
        self._training_block: Callable[..., Tensor] = Block.__call__
        angles = torch.arange(shape.context).double()[:, None] * frequencies(shape)[None, :]
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)  # [context, E]
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        if seed is not None:
            self._initialize(seed)

    @property
    def head_weight(self) -> Tensor:
        """[padded_vocab, D], the embedding's own where they are tied."""
        return self.model.embed_tokens.weight if self.shape.tied else self.lm_head.weight

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def set_activation_dtype(self, dtype: torch.dtype) -> "StudentLM":
        self.activation_dtype = dtype
        return self

    def compile_blocks(self) -> None:
        """Compile the block's training pass; all layers share one graph. Evaluation, whose shapes vary, stays eager."""
        self._training_block = torch.compile(Block.__call__, dynamic=False)

    @property
    def compiled(self) -> bool:
        return self._training_block is not Block.__call__

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """As `LanguageModel.hidden`, [B, T, D] in the activations' dtype."""
        x, cos, sin = self.embedded(tokens, 0 if prefix is None else prefix.length, positions)
        if prefix is not None:
            for index, layer in enumerate(self.model.layers):
                x, _ = layer.extend(x, cos, sin, prefix.layer(index, len(x)), mask)
            return self.model.norm(x)
        block = self._training_block if self.training and mask is None else Block.__call__
        for layer in self.model.layers:
            x = block(layer, x, cos, sin, mask)
        return self.model.norm(x)

    def embedded(
        self, tokens: Tensor, before: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens as the first block has them, [B, T, D], and the cosines and sines of their positions, [B or 1, T, E].

        They follow `before` others, where no positions [B, T] are given.
        """
        x = self.model.embed_tokens(tokens).to(self.activation_dtype)
        at = (None, slice(before, before + tokens.shape[1])) if positions is None else positions
        return x, self.cos[at].to(x.dtype), self.sin[at].to(x.dtype)

    def read_prefix(self, tokens: Tensor, prefix: Prefix | None = None) -> Prefix:
        """As `LanguageModel.read_prefix`."""
        spans, before = ((), 0) if prefix is None else (prefix.spans, prefix.length)
        x, cos, sin = self.embedded(torch.atleast_2d(tokens), before)
        span = []
        for index, layer in enumerate(self.model.layers):
            past = None if prefix is None else prefix.layer(index, len(x))
            x, (keys, values) = layer.extend(x, cos, sin, past)
            span.append((keys[:, :, before:].clone(), values[:, :, before:].clone()))  # a view would keep the rest
        return Prefix((*spans, tuple(span)), self.model.norm(x[:, -1]))

    def extend(self, tokens: Tensor, cache: list[KeysValues] | None = None) -> tuple[Tensor, list[KeysValues]]:
        """As `LanguageModel.extend`; kept are each layer's keys and values."""
        x, cos, sin = self.embedded(tokens, 0 if cache is None else cache[0][0].shape[2])
        kept = []
        for layer, past in zip(self.model.layers, cache or [None] * len(self.model.layers)):
            x, longer = layer.extend(x, cos, sin, past)
            kept.append(longer)
        return self.model.norm(x), kept

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., n_vocab] over real tokens alone, in the dtype of `hidden`."""
        return F.linear(hidden, self.head_weight[: self.n_vocab].to(hidden.dtype))

    def _initialize(self, seed: int) -> None:
        """All initial values. Projections back into the residual stream start at zero: a block begins as identity."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                nn.init.constant_(parameter, 0 if name.endswith("bias") else 1)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                nn.init.normal_(parameter, std=INIT_STD, generator=generator)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)


@cache
def parameter_count(shape: ModelShape) -> int:
    """As `StudentLM.parameter_count`; an embedding that is the head's weight too counts once."""
    with torch.device("meta"):
        return StudentLM(replace(shape, context=2), seed=None).parameter_count()


def frequencies(shape: ModelShape) -> Tensor:
    """Radians that each pair of a head's dimensions turns by at each position, float64 [E / 2]."""
    plain = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
    slow = shape.rope_scaling
    if slow is None:
        return plain
    # kept where the wavelength is short, divided by the factor where it is long, and between the two in between
    turns = slow.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - slow.low_freq_factor) / (slow.high_freq_factor - slow.low_freq_factor)).clamp(0, 1)
    return plain * (kept + (1 - kept) / slow.factor)
