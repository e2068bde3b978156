"""SmolLM2-135M out of its GGUF file: metadata to a Hugging Face configuration, 4-bit blocks to float32 tensors.

Only `gguf` reads the file; the dequantized weights are ordinary tensors.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from microlm.errors import UserError

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def read_gguf_llama(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a GGUF file of the llama architecture with tied embeddings.

    Returns:
        Keyword arguments of `transformers.LlamaConfig`, and a float32 state dict under Hugging Face names.

    Raises:
        UserError: the file is not GGUF, is truncated, or holds another architecture.
    """
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(path)
        metadata = {
            name: field.contents() for name, field in reader.fields.items() if name.startswith(("general.", "llama."))
        }
        if metadata.get("general.architecture") != "llama":
            raise UserError(f"{path}: holds {metadata.get('general.architecture')!r}, not the llama architecture")
        heads, kv_heads = metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]
        state = {}
        for tensor in reader.tensors:
            # numpy only views the file; a copy lets go of it
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            name = _hugging_face_name(tensor.name)
            if ".q_proj." in name or ".k_proj." in name:
                values = _half_split(values, heads if ".q_proj." in name else kv_heads)
            state[name] = values
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); fetch it again with: dvc repro -f -s fetch"
        ) from None
    vocabulary, width = state["model.embed_tokens.weight"].shape
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": True,
    }
    return config, state


def _hugging_face_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{kind}"


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """GGUF's llama stores rotary pairs interleaved; Hugging Face's attention wants the halves apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
