"""GGUF, llama.cpp's format: what it calls tensors and settings, and the order of a rotated projection's rows there."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from gguf import TensorNameMap

# an architecture's name there, by its name here. Mistral is a llama to llama.cpp.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
INTERLEAVED = "llama"  # the architecture that stores the two dimensions of a rotation side by side
GGUF_SETTINGS = {  # of a file's metadata, and what `transformers` calls them
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
