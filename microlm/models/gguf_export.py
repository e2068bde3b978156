"""A model of the llama family as one GGUF file, for llama.cpp and what is built on it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.tokenizer import Tokenizer
from microlm.corpus.tokenizer_format import DIGITS_PATTERN, GPT2_PATTERN, KNOWN_PATTERNS, cutting_pattern
from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.gguf_format import (
    ARCHITECTURES,
    INTERLEAVED,
    gguf_name,
    halves_interleaved,
    is_rotated,
    tensor_names,
)
from microlm.models.student import StudentLM, frequencies

if TYPE_CHECKING:
    from gguf import GGUFWriter

DTYPES = ("float16", "bfloat16", "float32")
# what llama.cpp's architectures ask for beyond the tensors: heads that are together as wide as the model; an output
# matrix also where it is the embedding
AS_WIDE, OWN_OUTPUT = ("qwen2", "olmo2"), ("olmo2",)
# llama.cpp knows a few ways to cut a text into words, each by a name
CUTS = dict(zip((GPT2_PATTERN, DIGITS_PATTERN, *KNOWN_PATTERNS), ("gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o")))


class Ends(NamedTuple):
    """The ids with which a text begins and ends."""

    bos: int
    eos: int
    begins: bool = True  # whether bos comes before a prompt by itself


def write_gguf(
    path: Path,
    model: StudentLM,
    tokenizer: Tokenizer,
    name: str,
    dtype: str = "float16",
    ends: Ends | None = None,
    licence: str | None = None,
) -> None:
    """Write the file; the same bytes for the same model. Rows of the embedding that are no token are left out.

    Args:
        name: of the model, as programs show it.
        ends: None is the end-of-text token, before a prompt too, as before every document of the corpus.
        dtype: of the matrices, one of `DTYPES`; vectors are float32, as llama.cpp wants them.
        licence: its SPDX name, if it is known.

    Raises:
        UserError: llama.cpp has no such architecture or no such tokenizer, or a weight is too large for `dtype`.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    refuse_foreign(model.shape, name)
    cut = name_of_cut(tokenizer, name)
    if tokenizer.n_vocab > model.n_vocab:
        raise UserError(
            f"{name}: its tokenizer has ids up to {tokenizer.n_vocab - 1}, its embedding rows up to "
            f"{model.n_vocab - 1}, so that no GGUF can hold both; leave --gguf out"
        )
    writer = GGUFWriter(path, ARCHITECTURES[model.shape.family])
    writer.add_type("model")
    writer.add_name(name)
    if licence:
        writer.add_license(licence)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    kinds = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16}
    writer.add_file_type(kinds.get(dtype, LlamaFileType.MOSTLY_BF16))
    _add_shape(writer, model.shape)
    _add_tokenizer(writer, tokenizer, model.n_vocab, cut, ends or Ends(tokenizer.eot_id, tokenizer.eot_id))
    for tensor_name, tensor in tensors(model):
        _add_tensor(writer, tensor_name, tensor, dtype, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refuse_foreign(shape: ModelShape, name: str) -> None:
    """UserError where llama.cpp's architecture of that name leaves out what the model has."""
    is_llama = ARCHITECTURES[shape.family] == INTERLEAVED
    beside = {
        "a bias in its MLP": shape.mlp_bias,
        "a bias in its attention": shape.attention_bias and not shape.kind.always_biased,
        "slowed rotations (rope_type llama3)": shape.rope_scaling is not None,
    }
    found = [what for what, has in beside.items() if has and not is_llama]
    if ARCHITECTURES[shape.family] in AS_WIDE and shape.query_width != shape.hidden_size:
        found.append(f"heads that are together {shape.query_width} wide in a width of {shape.hidden_size}")
    if found:
        raise UserError(
            f"{name}: has {found[0]}, which llama.cpp's {shape.family} has not, so that no GGUF can hold it; leave "
            "--gguf out"
        )


def name_of_cut(tokenizer: Tokenizer, name: str) -> str:
    """llama.cpp's word for how the tokenizer cuts a text. UserError where it has none."""
    pattern = cutting_pattern(json.loads(tokenizer.reference.to_str())["pre_tokenizer"])
    if pattern is None:
        raise UserError(
            f"{name}: llama.cpp knows no tokenizer that cuts a text like {tokenizer.name}; leave --gguf out (it knows "
            f"the cuts of {', '.join(CUTS.values())})"
        )
    return CUTS[pattern]


def tensors(model: StudentLM) -> Iterator[tuple[str, Tensor]]:
    """GGUF's names and values, in the order of the layers."""
    shape = model.shape
    architecture = ARCHITECTURES[shape.family]
    names = tensor_names(architecture, shape.layers)
    if shape.rope_scaling is not None:
        plain = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
        yield "rope_freqs.weight", (plain / frequencies(shape)).float()
    for name, tensor in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[: shape.n_vocab]
        elif architecture == INTERLEAVED and is_rotated(name):
            tensor = halves_interleaved(tensor, shape.heads if "q_proj" in name else shape.kv_heads)
        values = tensor.detach().cpu().float().contiguous()
        yield gguf_name(names, name), values
        if name == "model.embed_tokens.weight" and shape.tied and architecture in OWN_OUTPUT:
            yield gguf_name(names, "lm_head.weight"), values


def _add_tensor(writer: "GGUFWriter", tensor_name: str, tensor: Tensor, dtype: str, name: str) -> None:
    from gguf import GGMLQuantizationType, quantize

    values = tensor.numpy()
    if tensor.ndim < 2 or dtype == "float32":
        writer.add_tensor(tensor_name, values)
        return
    if dtype == "bfloat16":
        kind = GGMLQuantizationType.BF16
        writer.add_tensor(tensor_name, quantize(values, kind), raw_dtype=kind)
        return
    if (largest := float(np.abs(values).max())) > float(np.finfo(np.float16).max):
        raise UserError(f"{name}: {tensor_name} holds {largest:.3g}, too large for float16; take --dtype bfloat16")
    writer.add_tensor(tensor_name, values.astype(np.float16))


def _add_shape(writer: "GGUFWriter", shape: ModelShape) -> None:
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer, n_vocab: int, cut: str, ends: Ends) -> None:
    definition: dict[str, Any] = json.loads(tokenizer.reference.to_str())
    tokens, kinds = _vocabulary(definition, n_vocab)
    merges = (m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"])
    writer.add_tokenizer_model("gpt2")  # byte-level BPE, whoever's
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(ends.bos)
    writer.add_eos_token_id(ends.eos)
    writer.add_pad_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(ends.begins)
    writer.add_add_space_prefix(False)


def _vocabulary(definition: dict[str, Any], n_vocab: int) -> tuple[list[str], list[int]]:
    """Spelling and kind of each id; one that nothing has gets a name that no text is read as."""
    from gguf import TokenType

    tokens = [f"[PAD{token}]" for token in range(n_vocab)]
    kinds = [int(TokenType.UNUSED)] * n_vocab
    for spelling, token in definition["model"]["vocab"].items():
        tokens[token], kinds[token] = spelling, int(TokenType.NORMAL)
    for added in definition["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return tokens, kinds
