"""To and from Hugging Face model directories. The only module that imports transformers' models."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from microlm.corpus.tokenizer import Tokenizer, id_count
from microlm.errors import UserError
from microlm.files import atomic_directory, check_sums, read_json, sha256_bytes, sha256_file, write_json, write_sums
from microlm.models.architecture import MEND, config_of, shape_of
from microlm.models.model_names import hub_or_cache, refuse_absent_folder
from microlm.models.student import StudentLM
from microlm.models.transformers_model import TransformersModel
from microlm.runtime.paths import CARD, TRAINED_MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"


def save_student(
    model: StudentLM, tokenizer: Tokenizer, directory: Path, optimizer_state: dict[str, Tensor] | None = None
) -> None:
    """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` read as it is; whole or not at all.

    `optimizer_state` goes beside the weights, for a continuation that keeps the moments.
    """
    with atomic_directory(directory) as folder:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        if optimizer_state is not None:
            save_file(optimizer_state, folder / OPTIMIZER)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone, which a shared cache would pass on
        tokenizer.save(folder, model_max_length=model.context)
        write_json(
            folder / "generation_config.json", {"eos_token_id": tokenizer.eot_id, "bos_token_id": tokenizer.eot_id}
        )
        write_json(folder / "config.json", config_of(model.shape, tokenizer.eot_id))
        write_sums(folder)


def load_student(directory: Path, dtype: torch.dtype = torch.float32) -> StudentLM:
    """Read what `save_student` wrote; activations will be of `dtype`, weights are float32.

    Raises:
        UserError: a file is absent, damaged or of another shape.
    """
    stage = TRAINED_MODELS.get(directory.name, directory.name)
    mend = f"make it again with: dvc repro -f -s {stage}"
    check_sums(directory, ("config.json", WEIGHTS), mend)
    config = read_json(directory / "config.json", stage)
    try:
        shape = shape_of(config, config["microlm_n_vocab"], config["max_position_embeddings"], str(directory))
        model = StudentLM(shape, seed=None)
        model.load_state_dict(load_file(directory / WEIGHTS))
    except (SafetensorError, RuntimeError, KeyError, FileNotFoundError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{directory / WEIGHTS} is damaged or not of config.json's shape ({reason}); {mend}") from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{directory / WEIGHTS} holds weights that are not finite; {mend}")
    return model.set_activation_dtype(dtype)


def as_student(model: TransformersModel, name: str, mend: str = MEND) -> StudentLM:
    """A model of the llama family as a student of its own full shape: the same logits, float32 weights.

    Raises:
        UserError: it is of another family, or has what a student's arithmetic leaves out.
    """
    config = model.network.config.to_dict()
    try:
        shape = shape_of(config, model.n_vocab, model.uniform_context, name, mend)
    except KeyError as error:
        raise UserError(f"{name}: its config.json has no {error}; {mend}") from None
    state = {key: tensor.float() for key, tensor in model.network.state_dict().items()}
    if shape.tied:
        state.pop("lm_head.weight", None)
    student = StudentLM(shape, seed=None)
    student.load_state_dict(state)
    return student


def as_transformers(model: StudentLM, eot_id: int) -> "PreTrainedModel":
    """The student as transformers has it, ready to evaluate: the other way round than `as_student`.

    Its tensors are the student's own where they are of the activations' dtype, so that nothing is read or held twice.
    """
    import transformers

    config = config_of(model.shape, eot_id)
    network = getattr(transformers, config["architectures"][0])
    return network.from_pretrained(
        None,
        revision=None,
        config=network.config_class.from_dict(config),
        state_dict=dict(model.state_dict()),
        dtype=model.activation_dtype,
    ).to(model.head_weight.device)


def weights_sha256(directory: Path) -> str:
    """Of all safetensors files of a folder."""
    return sha256_bytes("".join(sha256_file(file) for file in sorted(directory.glob("*.safetensors"))).encode())


def is_ours(directory: Path) -> bool:
    """Whether `save_student` wrote it. UserError where there is no readable config.json."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is not there; name a folder with config.json, {WEIGHTS} and tokenizer.json")
    return "microlm_n_vocab" in read_json(path, directory.name)


def from_transformers(
    name: str, revision: str | None, dtype: torch.dtype, key: str = "params.yaml: teacher.model"
) -> tuple[TransformersModel, "PreTrainedTokenizerBase"]:
    """A model of a folder or the hub, ready to evaluate, and its tokenizer, whose ids are its real vocabulary.

    Raises:
        UserError: weights or tokenizer are absent, damaged or unreachable; it begins with `key`.
    """
    refuse_absent_folder(name, f"{key}: ")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if os.path.isdir(name):
        check_sums(Path(name), (file for file in os.listdir(name) if file != CARD), "copy the folder again")
    try:
        with nullcontext() if os.path.isdir(name) else hub_or_cache():
            network, found = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        where = "is not a folder here, and the hub did not give it" if not os.path.isdir(name) else "could not be read"
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{key}: {name} {where} ({reason}); name a folder with config.json, "
            "model.safetensors and tokenizer.json, or connect and try again"
        ) from None
    lacking = sorted(found["missing_keys"])  # transformers fills them with random numbers and goes on
    if lacking:
        raise UserError(
            f"{key}: {name}: its weights lack {lacking[0]} ({len(lacking)} tensors in all that config.json promises); "
            "fetch or make the model again"
        )
    if not os.path.isdir(name):
        _refuse_damaged_download(name, revision)
    n_vocab = min(id_count(tokenizer.get_vocab().values()), network.config.get_text_config().vocab_size)
    return TransformersModel(network, n_vocab).eval(), tokenizer


def _refuse_damaged_download(name: str, revision: str | None) -> None:
    """The hub's cache names a large file by its sha256, and nobody else compares the two."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    for file in Path(found).parent.glob("*.safetensors") if isinstance(found, str) else ():
        blob = file.resolve()
        if len(blob.name) == 64 and sha256_file(blob) != blob.name:
            raise UserError(f"{blob}: damaged, its sha256 is not its name; remove it, then run the same command again")
