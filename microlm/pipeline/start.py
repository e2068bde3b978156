"""The control's first weights -> models/start, and what they were chosen by.

Whoever starts `fresh` or from the `embedding` has the shape of params.yaml; a `pruned` student has what is left of its
teacher's.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from microlm.config import Config
from microlm.corpus.batches import cached_windows, evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import ParameterError
from microlm.evaluation.scoring.held_out_loss import loss_on
from microlm.files import atomic_file, write_json
from microlm.models import model_files, pruning
from microlm.models.architecture import ModelShape
from microlm.models.start_request import pruned_shape, refuse_embedding, refuse_pruned
from microlm.models.student import StudentLM
from microlm.models.teacher_source import TeacherSource, teacher_source
from microlm.objective.fused_head import token_nats
from microlm.parameters import ModelConfig
from microlm.report.figure_style import draw_layers
from microlm.runtime.device import Runtime
from microlm.runtime.paths import METRICS, PLOTS, SHARDS, START
from microlm.runtime.terminal import banner, progress_bar, waiting

LAYERS = PLOTS / "start.csv"
VOCABULARY_MULTIPLE = 64  # rows of the embedding: matrix products like round shapes

Made = tuple[StudentLM, dict[str, Any], pd.DataFrame | None]
"""The student, what is told of it, and its teacher's layers, where it has any of these."""


def make_start(config: Config, runtime: Runtime) -> None:
    """Write models/start, metrics/start.json, plots/start.csv and plots/start.png."""
    began, tokenizer = time.perf_counter(), load_tokenizer(SHARDS / "tokenizer")
    makers = {"fresh": _fresh, "embedding": _embedded, "pruned": _pruned}
    with config.naming_keys():
        model, told, layers = makers[config.start_kind](config, runtime, tokenizer)
    model.set_activation_dtype(runtime.dtype).to(runtime.device)
    if layers is None:
        layers = _table([0.0] * model.shape.layers, range(model.shape.layers))
    batch, val = config.at.batch, TokenShards(SHARDS, "val")
    windows, rows = config.at.pretrain.validation_windows, batch.micro_batch_rows
    with progress_bar(windows, 0, "window", "start: its loss") as bar:
        seen = loss_on(model, val, tokenizer.byte_lengths, batch.seq_len, windows, rows, bar.update)
    told = {"start": config.start_kind, "parameters": model.parameter_count(), **told}
    told |= {"shape": asdict(model.shape), "val_loss": seen.nats, "val_bpb": seen.bpb}
    shape = f"shape    {model.shape.layers} layers, {model.shape.hidden_size} wide"
    lines = [shape, f"untrained {seen.bpb:.3f} bits/byte"]
    banner(f"start: {config.start_kind}, {told['parameters']:,} parameters", lines)
    model_files.save_student(model, tokenizer, START)
    with atomic_file(LAYERS, "w") as file:
        layers.to_csv(file, index=False, float_format="%.6f", lineterminator="\n")
    draw_layers(layers, LAYERS.with_suffix(".png"))
    write_json(METRICS / "start.json", told | {"elapsed_s": round(time.perf_counter() - began, 1)})


def fresh_shape(model: ModelConfig, n_vocab: int) -> ModelShape:
    """What params.yaml asks for, for a tokenizer of `n_vocab` tokens."""
    padded = -(-n_vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return ModelShape(n_vocab=n_vocab, padded_vocab=padded, **asdict(model))


def fresh_student(config: Config, tokenizer: Tokenizer) -> StudentLM:
    """New weights in the shape that params.yaml asks for."""
    return StudentLM(fresh_shape(config.at.model, tokenizer.n_vocab), seed=config.seed)


def _fresh(config: Config, _: Runtime, tokenizer: Tokenizer) -> Made:
    return fresh_student(config, tokenizer), {}, None


def _embedded(config: Config, _: Runtime, tokenizer: Tokenizer) -> Made:
    """A fresh student whose embedding holds the principal directions of the teacher's, at a fresh one's length."""
    teacher = _teacher(config, tokenizer)
    theirs = teacher.network.get_input_embeddings().weight.detach()[: tokenizer.n_vocab].float()
    model, size = fresh_student(config, tokenizer), config.at.model.hidden_size
    refuse_embedding(size, theirs.shape[1])
    rows, share = pruning.principal_embedding(theirs, size)
    own = model.model.embed_tokens.weight.data
    own[: len(rows)] = rows * (own.square().mean() / rows.square().mean()).sqrt()
    count = sum(parameter.numel() for parameter in teacher.parameters())
    return model, {"teacher_parameters": count, "embedding_share": share}, None


def _pruned(config: Config, runtime: Runtime, tokenizer: Tokenizer) -> Made:
    """A sub-network of the teacher, chosen on evenly spaced windows of those that the teacher labels."""
    loaded, wanted = _teacher(config, tokenizer), config.at.start
    name = config.at.teacher.model
    refuse_pruned(wanted, loaded.network.config.to_dict(), name)
    teacher = model_files.as_student(loaded, name).set_activation_dtype(runtime.dtype).to(runtime.device)
    shards, seq_len = TokenShards(SHARDS, "train"), config.at.batch.seq_len
    labelled = cached_windows(shards, seq_len, config.at.teacher.windows)
    batch = read_batch(shards, labelled[evenly_spaced(len(labelled), wanted.calibration_windows)], seq_len)
    with waiting("start: what each part of the teacher does"):
        scores, shape, removed = pruning.importance(teacher, batch), pruned_shape(wanted, teacher.shape), None
    if isinstance(wanted.layers, list):
        layers = tuple(wanted.layers)
    elif wanted.layers is None or wanted.choose == "influence":
        layers = tuple(pruning.most_important(scores.layers, shape.layers).tolist())
    else:
        with progress_bar(pruning.tries(teacher.shape.layers, shape.layers), 0, "try", "start: layers") as bar:
            layers, removed = pruning.by_loss(teacher, batch, shape.layers, token_nats, bar.update)
    kept = pruning.Kept(
        layers,
        pruning.most_important(scores.hidden, shape.hidden_size),
        tuple(pruning.most_important(scores.groups[layer], shape.kv_heads) for layer in layers),
        tuple(pruning.most_important(scores.neurons[layer], shape.intermediate_size) for layer in layers),
    )
    student, whole = pruning.cut(teacher.cpu(), kept), teacher.parameter_count()
    told = {"teacher_parameters": whole, "kept": student.parameter_count() / whole, "layers": list(layers)}
    return student, told, _table(scores.layers.tolist(), layers, removed)


def _teacher(config: Config, tokenizer: Tokenizer) -> Any:
    """The teacher of params.yaml, float32, on the CPU. UserError where it reads other tokens than the corpus has."""
    source = teacher_source(config.at.teacher)
    with waiting(f"start: reading {source.name}"):
        return _read(source, config, tokenizer)


def _read(source: TeacherSource, config: Config, tokenizer: Tokenizer) -> Any:
    if source.tokenizer().fingerprint != tokenizer.fingerprint:
        raise ParameterError(
            f"teacher.model: {source.name} has another tokenizer than data/shards "
            f"(corpus.tokenizer: {config.at.corpus.tokenizer}), and start: {config.start_kind} needs the same; choose "
            "a teacher and a corpus.tokenizer that go together, or start: fresh"
        )
    return source.load(torch.float32)


def _table(influence: list[float], kept: Sequence[int], removed: list[tuple[int, float]] | None = None) -> pd.DataFrame:
    """A row for each layer: its influence, whether it stays; where losses chose, its turn and the loss without it."""
    layers = range(len(influence))
    table = pd.DataFrame({"layer": layers, "influence": influence, "kept": [int(i in kept) for i in layers]})
    if removed is not None:
        order = {layer: (turn, loss) for turn, (layer, loss) in enumerate(removed, start=1)}
        table["removed"], table["loss"] = zip(*(order.get(layer, (None, None)) for layer in layers))
    return table
