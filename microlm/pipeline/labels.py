"""The teacher's labels: check that the teacher fits, run it once, write data/teacher and metrics/teacher.json."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from microlm import gguf_llama, hub
from microlm.config import Config
from microlm.console import banner, progress_bar
from microlm.corpus.batches import cached_windows, read_batch
from microlm.corpus.shards import TokenShards
from microlm.corpus.tokenizer import Tokenizer, load_tokenizer
from microlm.errors import UserError
from microlm.evaluation.validation import ValidationLoss, validation_loss
from microlm.files import atomic_directory, write_json
from microlm.language_model import LanguageModel
from microlm.pipeline.teachers import refuse_misfit
from microlm.runtime import Runtime, peak_memory_bytes
from microlm.scratch import code_digest, scratch
from microlm.teacher import cache as cache_module
from microlm.teacher import capture as capture_module
from microlm.teacher.cache import MANIFEST, TABLE, CacheIdentity, cache_identity, manifest_of
from microlm.teacher.capture import capture

SHARDS, CACHE, METRICS = Path("data/shards"), Path("data/teacher"), Path("metrics/teacher.json")
CODE = (gguf_llama, hub, cache_module, capture_module)


def label(config: Config, runtime: Runtime) -> None:
    """Write the top-k cache of the windows that `continue` and `distill` train on.

    Whatever stops it, a kill or a full disk, the finished blocks stay in the stage's scratch folder until data/teacher
    and the metrics are whole: the same command goes on from there.
    """
    shards, tokenizer = TokenShards(SHARDS, "train"), load_tokenizer(SHARDS / "tokenizer")
    identity, windows = (
        cache_identity(config, shards),
        cached_windows(shards, config.at.batch.seq_len, config.at.teacher.windows),
    )
    refuse_impossible(identity, config)
    model = hub.load_teacher(config.at.teacher, runtime.dtype)
    refuse_misfit(model, identity, config)
    model.to(runtime.device)
    weights_sha256 = hub.teacher_fingerprint(config.at.teacher, model)
    tokens = len(windows) * identity.seq_len
    banner(
        f"teacher: {config.at.teacher.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
        [
            *runtime.lines(),
            f"cache    {tokens:,} tokens, top {identity.top_k}, {identity.record().itemsize} bytes each: "
            f"{tokens * identity.record().itemsize / 2**20:,.0f} MiB",
        ],
    )
    inputs = [identity.as_json(), weights_sha256, str(runtime.dtype), runtime.compiled, code_digest(*CODE)]
    began = time.perf_counter()
    with scratch("teacher", inputs) as directory:
        with progress_bar(tokens, 0, "tok", "teacher") as bar:
            fresh = capture(
                model, shards, windows, identity, directory, config.at.teacher.batch_rows, runtime.compiled, bar.update
            )
        tokens_per_s = fresh / (time.perf_counter() - began)
        publish(directory, identity, manifest_of(identity, weights_sha256, str(runtime.dtype), directory))
        metrics = _metrics(model, config, identity, directory, shards, windows, tokenizer)
        speed = {"tokens_per_s": round(tokens_per_s, 1), "elapsed_s": round(time.perf_counter() - began, 1)}
        write_json(METRICS, metrics | speed | {"peak_memory_bytes": peak_memory_bytes()})


def publish(source: Path, identity: CacheIdentity, manifest: dict[str, Any]) -> None:
    """data/teacher, whole or not at all, from the blocks in `source`, which stay there."""
    with atomic_directory(CACHE) as folder:
        for name in (*(name for name, _ in identity.blocks()), TABLE):
            try:
                os.link(source / name, folder / name)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(source / name, folder / name)
        write_json(folder / MANIFEST, manifest)


def _metrics(
    model: LanguageModel,
    config: Config,
    identity: CacheIdentity,
    directory: Path,
    shards: TokenShards,
    windows: np.ndarray,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    train = _loss_in(directory, identity, shards, windows, tokenizer)
    val = validation_loss(
        model,
        TokenShards(SHARDS, "val"),
        tokenizer.byte_lengths,
        identity.seq_len,
        config.at.pretrain.validation_windows,
        config.at.teacher.batch_rows,
    )
    return {
        "model": config.at.teacher.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(windows) * identity.seq_len,
        "top_k": identity.top_k,
        "bytes_per_token": identity.record().itemsize,
        "head_mass": _head_mass(directory, identity),
        "train": {"nats": train.nats, "bpb": train.bpb},
        "val": {"nats": val.nats, "bpb": val.bpb},
    }


def refuse_impossible(identity: CacheIdentity, config: Config) -> None:
    if identity.top_k > identity.n_vocab:
        raise UserError(
            f"params.yaml: scales.{config.scale}.teacher.top_k: {identity.top_k} is more than the vocabulary of "
            f"{identity.n_vocab}; lower it"
        )


def _records(directory: Path, identity: CacheIdentity) -> list[tuple[slice, np.memmap]]:
    shape = (-1, identity.seq_len)
    return [
        (part, np.memmap(directory / name, identity.record(), "r").reshape(shape)) for name, part in identity.blocks()
    ]


def _loss_in(
    directory: Path, identity: CacheIdentity, shards: TokenShards, windows: np.ndarray, tokenizer: Tokenizer
) -> ValidationLoss:
    """The teacher's own loss on the cached windows, from the gold log-probabilities."""
    nats = np.concatenate([-block["gold"].sum(-1, dtype=np.float64) for _, block in _records(directory, identity)])
    targets = [
        read_batch(shards, windows[part], identity.seq_len).targets.numpy() for part, _ in _records(directory, identity)
    ]
    lengths = np.concatenate([tokenizer.byte_lengths[t].sum(-1) for t in targets])
    return ValidationLoss(windows, nats, lengths, len(windows) * identity.seq_len)


def _head_mass(directory: Path, identity: CacheIdentity) -> float:
    """Mean probability that the k cached tokens hold."""
    at = identity.temperatures.index(1.0)
    masses = [1 - np.exp(block["log_tail"][..., at].astype(np.float64)) for _, block in _records(directory, identity)]
    return float(np.concatenate([m.ravel() for m in masses]).mean())
