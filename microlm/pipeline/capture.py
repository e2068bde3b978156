"""The teacher's labels: check that the teacher fits, run it once, write data/teacher and metrics/teacher.json."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from microlm.config import Config
from microlm.corpus.batches import cached_windows, evenly_spaced, read_batch, window_count
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError
from microlm.evaluation.scoring.held_out_loss import ValidationLoss, loss_on
from microlm.files import atomic_directory, write_json
from microlm.models.teacher_source import teacher_source
from microlm.runtime import distributed
from microlm.runtime.device import Runtime, peak_memory_bytes
from microlm.runtime.paths import CACHE, METRICS, SHARDS
from microlm.runtime.resume import resumable, stage_code
from microlm.runtime.terminal import banner, progress_bar, waiting
from microlm.teacher.cache import MANIFEST, TABLE, CacheIdentity, cache_identity, manifest_of, map_block, sealed_sums
from microlm.teacher.capture import capture, projected_loss
from microlm.teacher.projection import loss_of_gold, native_loss
from microlm.teacher.recorders import Recorder, load_recorder


def capture_teacher(config: Config, runtime: Runtime) -> None:
    """Write the top-k cache of the windows that `continue` and `distill` train on.

    Whatever stops it, a kill or a full disk, the finished blocks stay under .resume until data/teacher
    and the metrics are whole: the same command goes on from there.
    """
    at, shards, tokenizer = config.at, TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    windows = cached_windows(shards, at.batch.seq_len, at.teacher.windows)
    identity = cache_identity(at.teacher, at.batch.seq_len, shards)
    refuse_impossible(identity, config)
    with config.naming_keys():
        source = teacher_source(at.teacher)
        with waiting(f"teacher: reading {at.teacher.model}"):
            record = load_recorder(source, identity, runtime, tokenizer)
    identity, projection, weights_sha256 = record.identity, record.projection, source.fingerprint(record.model)
    told = {
        "model": at.teacher.model,
        "parameters": sum(p.numel() for p in record.model.parameters()),
        "source": identity.source,
        "tokens": len(windows) * identity.seq_len,
        "top_k": identity.top_k,
    }
    written = "none: the teacher runs in the students' steps (teacher.source: live); its mean distribution alone"
    if identity.source == "cache":
        size = f"{identity.token_bytes} bytes each: {told['tokens'] * identity.token_bytes / 2**20:,.0f} MiB"
        written = f"{told['tokens']:,} tokens, top {identity.top_k}, {identity.record} records, {size}"
    lines = [*runtime.lines(), f"cache    {written}"]
    if projection:
        lines.append(f"tokens   {projection.teacher.name}'s, projected to {tokenizer.name}'s")
    banner(f"teacher: {at.teacher.model}, {told['parameters']:,} parameters", lines)
    inputs = [identity.as_json(), weights_sha256, str(runtime.dtype), runtime.compiled, stage_code("teacher")]
    began = time.perf_counter()
    with resumable("teacher", inputs) as directory:
        mine = sum(part.stop - part.start for _, part in distributed.dealt(identity.blocks())) * identity.seq_len
        with progress_bar(mine, 0, "tok", "teacher") as bar:
            fresh = capture(record, shards, windows, directory, at.teacher.batch_rows, bar.update)
        if not distributed.is_first():
            return
        speed = {"tokens_per_s": round(fresh / (time.perf_counter() - began), 1)}
        publish(directory, manifest_of(identity, weights_sha256, str(runtime.dtype), directory))
        labelled = None
        if identity.source == "cache":
            labelled = _labelled_loss(directory, identity, shards, windows, tokenizer)
            head_mass = sum(sealed_sums(directory / name)["head_mass"] for name, _ in identity.blocks())
            told |= {"record": identity.record, "bytes_per_token": identity.token_bytes}
            told |= {"head_mass": head_mass / labelled.tokens, "train": _in_units(labelled)}
        with waiting("teacher: its loss on validation text"):
            told |= _held_out(record, config, tokenizer, labelled)
        speed |= {"elapsed_s": round(time.perf_counter() - began, 1), "peak_memory_bytes": peak_memory_bytes()}
        write_json(METRICS / "teacher.json", told | speed)


def publish(source: Path, manifest: dict[str, Any]) -> None:
    """data/teacher, whole or not at all, from the files of `manifest` in `source`, which stay there."""
    with atomic_directory(CACHE) as folder:
        for name in (*(block["file"] for block in manifest["blocks"]), TABLE):
            try:
                os.link(source / name, folder / name)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source / name, folder / name)
        write_json(folder / MANIFEST, manifest)


def _in_units(loss: ValidationLoss) -> dict[str, float]:
    return {"nats": loss.nats, "bpb": loss.bpb}


def _held_out(
    record: Recorder, config: Config, tokenizer: Tokenizer, labelled: ValidationLoss | None
) -> dict[str, Any]:
    """The teacher's own loss on validation text; of a projected one also that of what the student is shown of it."""
    model, identity, projection = record.model, record.identity, record.projection
    val, seq_len, rows = TokenShards(SHARDS, "val"), identity.seq_len, config.at.teacher.batch_rows
    wanted, lengths = config.at.pretrain.validation_windows, tokenizer.byte_lengths
    if projection is None:
        return {"val": _in_units(loss_on(model, val, lengths, seq_len, wanted, rows))}
    chosen = evenly_spaced(window_count(val, seq_len), wanted)
    told = {"val": _in_units(native_loss(model, projection, val, seq_len, chosen, rows))}
    told["tokenizers"] = {"teacher": projection.teacher.name, "student": tokenizer.name}
    if labelled is not None:
        told["coverage"] = labelled.tokens / (identity.windows * seq_len)
    shown, shared = projected_loss(record, val, chosen, rows, lengths)
    in_val = {"coverage": shown.tokens / (len(chosen) * seq_len), "shared_boundaries": shared}
    return told | {"val_projected": _in_units(shown) | in_val}


def refuse_impossible(identity: CacheIdentity, config: Config) -> None:
    if identity.top_k > identity.n_vocab:
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.top_k: {identity.top_k} is more than the vocabulary of "
            f"{identity.n_vocab}; lower it"
        )


def _labelled_loss(
    directory: Path, identity: CacheIdentity, shards: TokenShards, windows: np.ndarray, tokenizer: Tokenizer
) -> ValidationLoss:
    """The teacher's own loss on the cached windows, from the gold columns where it speaks: no record is read again."""

    def said() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for name, part in identity.blocks():
            _, gold = map_block(directory / name, identity, part.stop - part.start)
            targets = read_batch(shards, windows[part], identity.seq_len).targets.numpy()
            yield ~np.isnan(gold), gold, targets  # of a projected record that is not covered it is NaN, nowhere else

    return loss_of_gold(windows, said(), tokenizer.byte_lengths)
