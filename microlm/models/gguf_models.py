"""GGUF files as transformers' models: the llama architecture, and Gemma 3's text models.

Only `gguf` reads the file: its metadata become a Hugging Face configuration, its blocks of a few bits float32 tensors,
which are then cast.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.metaspace import MetaspaceTokenizer
from microlm.corpus.metaspace_format import metaspace_definition
from microlm.errors import UserError
from microlm.models.gguf_format import GGUF_SETTINGS, gguf_name, halves_apart, is_rotated, tensor_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FETCH_AGAIN = "fetch it again with: dvc repro -f -s fetch"
GEMMA3_LOCAL_THETA, GEMMA3_PATTERN = 10_000.0, 6  # no file says: llama.cpp knows them by the architecture's name


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture is in transformers."""

    classes: str  # its configuration's, before Config
    causal: str  # its model's
    more: Callable[[Mapping[str, Any]], dict[str, Any]]  # metadata, without the architecture's name, to settings
    stored: Callable[[str, Tensor, "PreTrainedConfig"], Tensor]  # a tensor of the file to transformers' own


def _llama_tensor(name: str, values: Tensor, config: "PreTrainedConfig") -> Tensor:
    """GGUF's llama stores rotary pairs interleaved; Hugging Face's attention wants the halves apart."""
    if not is_rotated(name):
        return values
    return halves_apart(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)


def _gemma3_tensor(name: str, values: Tensor, _: "PreTrainedConfig") -> Tensor:
    """A norm multiplies by 1 + its weight, and the file holds the sum."""
    return values - 1 if name.endswith("norm.weight") else values


def _llama_settings(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": said["rope.freq_base"]}}


def _gemma3_settings(said: Mapping[str, Any]) -> dict[str, Any]:
    thetas = {"sliding_attention": GEMMA3_LOCAL_THETA, "full_attention": said["rope.freq_base"]}
    layers = range(1, said["block_count"] + 1)
    return {
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
        "layer_types": ["sliding_attention" if layer % GEMMA3_PATTERN else "full_attention" for layer in layers],
        "sliding_window": said["attention.sliding_window"],
        "head_dim": said["attention.key_length"],
        "query_pre_attn_scalar": said["attention.key_length"],
    }


ARCHITECTURES = {
    "llama": Architecture("Llama", "LlamaForCausalLM", _llama_settings, _llama_tensor),
    "gemma3": Architecture("Gemma3Text", "Gemma3ForCausalLM", _gemma3_settings, _gemma3_tensor),
}


class GgufFile:
    """An open file. Its metadata are read once: gguf takes seconds for the entries of a large vocabulary."""

    def __init__(self, path: Path) -> None:
        """UserError where it is not GGUF or is truncated."""
        from gguf import GGUFReader

        self._path = path
        with self._whole():
            reader = GGUFReader(path)
            # and let go of: it keeps an array for each entry, half a gigabyte of Gemma's
            self._metadata = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    @contextmanager
    def _whole(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{self._path}: not a whole GGUF file ({error}); {FETCH_AGAIN}") from None

    def _said(self, prefix: str) -> dict[str, Any]:
        """The metadata whose names begin with `prefix`."""
        return {key.removeprefix(prefix): value for key, value in self._metadata.items() if key.startswith(prefix)}

    def network(self, dtype: torch.dtype) -> "PreTrainedModel":
        """A model with tied embeddings, in `dtype`.

        Raises:
            UserError: the file is truncated, or holds another architecture.
        """
        import transformers
        from gguf import dequantize

        with self._whole():
            name = self._said("general.").get("architecture")
            if name not in ARCHITECTURES:
                raise UserError(
                    f"{self._path}: holds {name!r}, not one of the architectures {', '.join(ARCHITECTURES)}"
                )
            architecture, said = ARCHITECTURES[name], self._said(f"{name}.")
            config = getattr(transformers, f"{architecture.classes}Config")(
                vocab_size=int(self._tensors["token_embd.weight"].shape[-1]),
                tie_word_embeddings=True,
                **architecture.more(said),
                **{f"{end}_token_id": self._metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")},
                **{ours: said[theirs] for theirs, ours in GGUF_SETTINGS.items()},
            )
            model = getattr(transformers, architecture.causal)
            with torch.device("meta"):
                names = model(config).state_dict().keys() - {"lm_head.weight"}
            gguf_names = tensor_names(name, config.num_hidden_layers)
            state = {}
            for key in names:
                tensor = self._tensors[gguf_name(gguf_names, key)]
                # numpy only views the file; a copy lets go of it
                values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
                state[key] = architecture.stored(key, values, config)
        return model.from_pretrained(None, revision=None, config=config, state_dict=state, dtype=dtype)

    def metaspace_tokenizer(self, name: str) -> MetaspaceTokenizer:
        """The SentencePiece BPE in the metadata. UserError where there is none, or one with a space before a text."""
        with self._whole():
            said = self._said("tokenizer.ggml.")
            if said.get("model") != "llama" or said.get("add_space_prefix", True):
                raise UserError(
                    f"{self._path}: its tokenizer is no SentencePiece BPE without a space before a text; {FETCH_AGAIN}"
                )
            begin = said["bos_token_id"] if said.get("add_bos_token", True) else None
            pieces = said["tokens"], said["scores"], said["token_type"]
            definition = metaspace_definition(*pieces, begin, said["unknown_token_id"])
        return MetaspaceTokenizer(name, definition, str(self._path))
