"""Whether a start can be had from a teacher: refused from shapes alone, before weights are read."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from microlm.corpus.parts import GEMMA3_MODEL
from microlm.errors import ParameterError, UserError
from microlm.models.architecture import COUNTS, FAMILIES, ModelShape, shape_of
from microlm.parameters import ScaleConfig, StartConfig

# of the packaged SmolLM2-135M, whose GGUF file says the same
PACKAGED = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
PACKAGED_TOKENIZER = "smollm2"
CHOSEN = ("layers", "hidden_size", "heads", "intermediate_size")  # by `start`, of the teacher's


def check_start(kind: str, at: ScaleConfig) -> None:
    """ParameterError, a line for each thing, where a start (fresh, embedding or pruned) cannot be had from its teacher.

    Of a teacher on the hub nothing is known here; stage `start` says it then.
    """
    teacher, tokenizer = at.teacher.model, at.corpus.tokenizer
    if kind == "fresh":
        return
    if teacher == "packaged" and tokenizer != PACKAGED_TOKENIZER:
        raise ParameterError(
            f"corpus.tokenizer: {tokenizer} is not the teacher's, and a student that starts "
            f"from its teacher ({kind}) needs the same; set it to {PACKAGED_TOKENIZER}, or start to fresh"
        )
    if teacher == GEMMA3_MODEL:
        raise ParameterError(
            f"teacher.model: {teacher} reads SentencePiece's tokens, no corpus has them, and a student that starts "
            f"from its teacher ({kind}) needs the same; set start to fresh"
        )
    known = _known(teacher)
    if known is None:
        return
    if kind == "pruned":
        refuse_pruned(at.start, known, teacher)
    else:
        own = at.model.hidden_size
        refuse_embedding(own, known.get("hidden_size", own))  # some call it otherwise


def pruned_shape(start: StartConfig, teacher: ModelShape) -> ModelShape:
    """What is left of `teacher`."""
    left = {key: getattr(start, key) or getattr(teacher, key) for key in CHOSEN}
    if isinstance(start.layers, list):
        left["layers"] = len(start.layers)
    return replace(teacher, **left, kv_heads=left["heads"] * teacher.kv_heads // teacher.heads)


def known_shape(teacher: str, n_vocab: int) -> ModelShape | None:
    """Of a teacher that is packaged or a folder here; None of one on the hub. UserError as `shape_of`."""
    config = _known(teacher)
    if config is None:
        return None
    try:
        return shape_of(config, n_vocab, config["max_position_embeddings"], teacher)
    except KeyError as error:
        raise UserError(f"{teacher}: its config.json has no {error}; choose another teacher, or start: fresh") from None


def refuse_pruned(start: StartConfig, teacher: Mapping[str, Any], name: str) -> None:
    """ParameterError, a line for each thing in `start` that a teacher with this config.json cannot give."""
    if teacher.get("model_type") not in FAMILIES:
        raise ParameterError(
            f"teacher.model: {name} is of architecture {teacher.get('model_type')!r}, and only {', '.join(FAMILIES)} "
            "can be cut; choose such a teacher, or start: fresh"
        )
    found, has = [], {key: teacher[COUNTS[key]] for key in CHOSEN}
    for key, most in has.items():
        wanted = getattr(start, key)
        if isinstance(wanted, int) and wanted > most:
            found.append(f"start.{key}: {wanted} is more than the teacher's {most}; lower it")
    if isinstance(start.layers, list):
        outside = [layer for layer in start.layers if not 0 <= layer < has["layers"]]
        if outside:
            found.append(f"start.layers: {outside[0]} is none of the teacher's 0 to {has['layers'] - 1}")
        elif any(after <= before for before, after in pairwise(start.layers)):
            found.append(f"start.layers: {start.layers} must ascend, each layer once: they stay in the teacher's order")
    group = has["heads"] // teacher["num_key_value_heads"]
    if start.heads is not None and start.heads % group:
        found.append(
            f"start.heads: {start.heads} is not a multiple of {group}, the queries that share a head of keys and values"
        )
    hidden, heads = start.hidden_size or has["hidden_size"], start.heads or has["heads"]
    if not found and teacher["model_type"] == "llama" and hidden % heads:
        found.append(
            f"start.hidden_size: {hidden} is not a multiple of the {heads} heads, which transformers asks of a llama"
        )
    if found:
        raise ParameterError("\n".join(found))


def refuse_embedding(wanted: int, has: int) -> None:
    if wanted > has:
        raise ParameterError(
            f"model.hidden_size: {wanted} is more than the teacher's {has}, whose embedding has no more; lower it"
        )


def _known(teacher: str) -> Mapping[str, Any] | None:
    """Its config.json as transformers reads it: older files leave out what a newer release spells otherwise."""
    if teacher == "packaged":
        return PACKAGED
    if not (Path(teacher) / "config.json").is_file():
        return None  # on the hub, or not there: who loads it says which
    from transformers import AutoConfig  # seconds, and only for a teacher of one's own

    try:
        return AutoConfig.from_pretrained(teacher, revision=None, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError, TypeError):
        return None  # who loads it says what is wrong with it
