"""A training step of the laptop's student: ours, ours with distillation from a cache, and two opponents.

`transformers` is the same shape as its own class there in bf16 autocast (float32 where this machine has no bf16), with
`F.cross_entropy` on full float32 logits, and the same tokens. `linear-ce` and `chunked-ce` are our step with PyTorch's
own head and loss in place of ours: `F.linear_cross_entropy` (PyTorch 2.13) as it is called, and in chunks. Each variant
runs in a process of its own, so that compilation, memory and its peak are its own; rounds alternate, and the ratio is
of medians.

    python -m bench.train_step [--rounds 3] [--steps 6] [--start fresh]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear_cross_entropy

from microlm.config import Config, load_config
from microlm.files import write_json
from microlm.models.architecture import ModelShape, config_of
from microlm.models.student import StudentLM, parameter_count
from microlm.objective.divergences import SparseTeacher
from microlm.objective.fused_head import Objective, fused_head_loss
from microlm.research.plan.sizes import VOCABULARIES, student_shape
from microlm.runtime.device import Runtime, peak_memory_bytes, set_up
from microlm.teacher.cache import MANIFEST, TABLE, CacheIdentity, TeacherCache, manifest_of, sparse_teacher
from microlm.training.optimizer import Optimizers

VOCABULARY, TOP_K = 49152, 64
VARIANTS = ("ours", "distill", "linear-ce", "chunked-ce", "transformers")
CHUNK_ROWS = 256  # what `auto` chooses takes five times as long on the CPU
Head = Callable[[Tensor, Tensor, Tensor, np.ndarray], Tensor]
"""(hidden, weight, targets, windows of these tokens) -> loss of a part, divided by the tokens of the step."""


def shape_of(config: Config) -> ModelShape:
    """Of the start that params.yaml names: the laptop's is cut out of its teacher."""
    return student_shape(config, VOCABULARIES["smollm2"])


def random_cache(directory: Path, config: Config) -> TeacherCache:
    """A cache on disk of as many windows as a step has, distinct ids as skewed to frequent tokens as real ones are."""
    batch, generator = config.at.batch, np.random.default_rng(1)
    identity = CacheIdentity("random", None, "", VOCABULARY, "", batch.seq_len, batch.rows, TOP_K, (1.0,))
    spread = generator.random((batch.rows, batch.seq_len, TOP_K)).cumsum(-1) ** 2.2 * (VOCABULARY / TOP_K**2.2)
    ids = np.minimum(spread.astype(np.int64) + np.arange(TOP_K), VOCABULARY - 1)
    logits = 2 * generator.standard_normal((batch.rows, batch.seq_len, TOP_K + 1))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    columns = (torch.from_numpy(column).flatten(0, 1) for column in (ids, log_p[..., :-1], log_p[..., -1:]))
    records = identity.layout.pack(*columns).view(batch.rows, batch.seq_len, -1).numpy()
    for name, part in identity.blocks():
        gold = np.zeros((part.stop - part.start, batch.seq_len), np.float32)
        (directory / name).write_bytes(records[part].tobytes() + gold.tobytes())
    (directory / TABLE).write_bytes(np.full((1, VOCABULARY), -np.log(VOCABULARY), np.float32).tobytes())
    write_json(directory / MANIFEST, manifest_of(identity, "", "", directory))
    return TeacherCache(directory, identity, np.arange(batch.rows))


def teacher_of(cache: TeacherCache, windows: np.ndarray) -> SparseTeacher:
    return sparse_teacher(cache.read(windows), cache.identity, cache.tables, 1.0)


def our_head(config: Config, cache: TeacherCache | None) -> Head:
    objective, count = Objective(0.5, 0.5) if cache else Objective(), config.at.batch.batch_tokens

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, windows: np.ndarray) -> Tensor:
        teacher = teacher_of(cache, windows) if cache else None
        return fused_head_loss(hidden, weight, targets, VOCABULARY, objective, teacher, count).loss

    return loss


def torchs_head(config: Config, chunked: bool) -> Head:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_ROWS) if chunked else None
    count = config.at.batch.batch_tokens

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, _: np.ndarray) -> Tensor:
        narrow = weight.to(hidden.dtype)
        return linear_cross_entropy(hidden, narrow, targets, options=options, reduction="sum") / count

    return loss


def step_under(config: Config, runtime: Runtime, head: Head) -> Callable[[], None]:
    """Our model and optimizers."""
    batch = config.at.batch
    model = StudentLM(shape_of(config)).set_activation_dtype(runtime.dtype).train()
    if runtime.compiled:
        model.compile_blocks()
    optimizers = Optimizers(model, config.at.pretrain)
    tokens = torch.randint(
        0, VOCABULARY, (batch.micro_batch_rows, batch.seq_len + 1), generator=torch.Generator().manual_seed(0)
    )

    def step() -> None:
        for start in range(0, batch.rows, batch.micro_batch_rows):
            windows = np.arange(start, start + batch.micro_batch_rows)
            hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
            head(hidden, model.head_weight, tokens[:, 1:].flatten(), windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1.0)

    return step


def transformers_step(config: Config, runtime: Runtime) -> Callable[[], None]:
    from transformers import AutoConfig, AutoModelForCausalLM

    batch = config.at.batch
    settings = config_of(shape_of(config), eot_id=0) | {"use_cache": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).train()
    optimizers = Optimizers(model, config.at.pretrain)
    tokens = torch.randint(
        0, VOCABULARY, (batch.micro_batch_rows, batch.seq_len + 1), generator=torch.Generator().manual_seed(0)
    )
    parts = batch.batch_tokens // (batch.micro_batch_rows * batch.seq_len)

    def step() -> None:
        for _ in range(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=runtime.dtype == torch.bfloat16):
                logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1.0)

    return step


def measure(variant: str, steps: int, start: str, directory: Path) -> dict[str, float]:
    config = load_config(start=start)
    runtime = set_up(config.at.runtime)
    cache = random_cache(directory, config) if variant == "distill" else None
    if variant == "transformers":
        step = transformers_step(config, runtime)
    else:
        theirs = variant in ("linear-ce", "chunked-ce")
        head = torchs_head(config, variant == "chunked-ce") if theirs else our_head(config, cache)
        step = step_under(config, runtime, head)
    for _ in range(2):  # compilation and first touches of memory
        step()
    measured = {"step_s": statistics.median(_timed(step) for _ in range(steps)), "peak_bytes": peak_memory_bytes()}
    if cache:
        windows = np.arange(config.at.batch.rows)
        measured["read_s"] = statistics.median(_timed(lambda: teacher_of(cache, windows)) for _ in range(steps))
    return measured


def matrix_peak(runtime: Runtime) -> float:
    """FLOP/s of this machine's best large product in the activations' dtype."""
    a, b = (torch.randn(2048, 2048).to(runtime.dtype) for _ in range(2))
    best = min(_timed(lambda: a @ b) for _ in range(20))
    return 2 * 2048**3 / best


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--start", default="auto", help="as in params.yaml")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        with tempfile.TemporaryDirectory() as directory:
            print(json.dumps(measure(arguments.variant, arguments.steps, arguments.start, Path(directory))))
        return
    config = load_config(start=arguments.start)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "bench.train_step", "--variant", variant, "--steps", str(arguments.steps)]
            command += ["--start", arguments.start]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[variant].append(json.loads(ended.stdout.splitlines()[-1]))
    step_s = {v: statistics.median(r["step_s"] for r in rows) for v, rows in runs.items()}
    peak = {v: statistics.median(r["peak_bytes"] for r in rows) for v, rows in runs.items()}
    tokens = config.at.batch.batch_tokens
    for variant in VARIANTS:
        print(
            f"{variant:<13} {tokens / step_s[variant]:8,.0f} tokens/s   {step_s[variant] * 1e3:7.0f} ms a step   "
            f"peak {peak[variant] / 2**30:.2f} GiB"
        )
    shape = shape_of(config)
    matrices = parameter_count(shape)  # tied: the embedding's rows are the head's
    flops = 6 * matrices * tokens + 12 * shape.layers * shape.query_width * config.at.batch.seq_len * tokens // 2
    runtime = set_up(config.at.runtime)
    ratios = {
        "speed, ours / transformers": step_s["transformers"] / step_s["ours"],
        "memory, ours / transformers": peak["ours"] / peak["transformers"],
        "speed, ours / F.linear_cross_entropy": step_s["linear-ce"] / step_s["ours"],
        "memory, ours / F.linear_cross_entropy": peak["ours"] / peak["linear-ce"],
        "speed, ours / F.linear_cross_entropy in chunks": step_s["chunked-ce"] / step_s["ours"],
        "memory, ours / F.linear_cross_entropy in chunks": peak["ours"] / peak["chunked-ce"],
        "step time, distill / cross-entropy": step_s["distill"] / step_s["ours"],
        "step time, distill / F.linear_cross_entropy": step_s["distill"] / step_s["linear-ce"],
    }
    for said, ratio in ratios.items():
        print(f"{said:<48} {ratio:.3f}")
    read = statistics.median(row["read_s"] for row in runs["distill"])
    print(f"reading the cache / distill step                 {read / step_s['distill']:.3f}")
    print(f"share of the matrix peak                         {flops / step_s['ours'] / matrix_peak(runtime):.2f}")


if __name__ == "__main__":
    main()
