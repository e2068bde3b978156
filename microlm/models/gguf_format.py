"""GGUF, llama.cpp's format: what it calls the tensors and settings of the llama family, and a llama read back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from microlm.errors import UserError

if TYPE_CHECKING:
    from gguf import TensorNameMap

# an architecture's name there, by its name here. Mistral is a llama to llama.cpp.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
INTERLEAVED = "llama"  # the architecture that stores the two dimensions of a rotation side by side
GGUF_SETTINGS = {  # of a llama's metadata, and what `transformers.LlamaConfig` calls them
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


def tensor_names(architecture: str, layers: int) -> "TensorNameMap":
    """Hugging Face's names -> GGUF's, of an architecture as GGUF names it."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    return get_tensor_name_map(next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == architecture), layers)


def gguf_name(names: "TensorNameMap", name: str) -> str:
    """KeyError where the architecture has no such tensor there."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise KeyError(name)
    return found


def is_rotated(name: str) -> bool:
    """Whether it is a projection to queries or keys, whose rows a rotation pairs."""
    return name.rpartition(".")[0].endswith(("q_proj", "k_proj"))


def halves_interleaved(rows: Tensor, heads: int) -> Tensor:
    """Hugging Face's rows of a rotated projection, [heads * E, ...], each head's halves apart, as GGUF's llama has
    them: the pairs that turn together side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """The other way round."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_gguf_llama(path: Path, dtype: torch.dtype) -> Any:
    """A GGUF file of the llama architecture with tied embeddings -> `transformers.LlamaForCausalLM`.

    Only `gguf` reads the file: its metadata become a Hugging Face configuration, its blocks of 4 bits float32 tensors,
    which are then cast.

    Raises:
        UserError: the file is not GGUF, is truncated, or holds another architecture.
    """
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        reader = GGUFReader(path)
        architecture = reader.fields.get("general.architecture")
        if architecture is None or architecture.contents() != INTERLEAVED:
            raise UserError(f"{path}: holds {architecture and architecture.contents()!r}, not the llama architecture")
        told = ("llama.", "tokenizer.ggml.bos", "tokenizer.ggml.eos")
        said = {name: field.contents() for name, field in reader.fields.items() if name.startswith(told)}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config = LlamaConfig(
            vocab_size=int(stored["token_embd.weight"].shape[-1]),
            rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
            tie_word_embeddings=True,
            **{f"{end}_token_id": said.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")},
            **{ours: said[f"llama.{theirs}"] for theirs, ours in GGUF_SETTINGS.items()},
        )
        with torch.device("meta"):
            names = LlamaForCausalLM(config).state_dict().keys() - {"lm_head.weight"}
        gguf_names = tensor_names(INTERLEAVED, config.num_hidden_layers)
        state = {}
        for name in names:
            tensor = stored[gguf_name(gguf_names, name)]
            # numpy only views the file; a copy lets go of it
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            if is_rotated(name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = halves_apart(values, heads)
            state[name] = values
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); fetch it again with: dvc repro -f -s fetch"
        ) from None
    return LlamaForCausalLM.from_pretrained(None, revision=None, config=config, state_dict=state, dtype=dtype)
