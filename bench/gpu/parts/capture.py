"""The teachers' pass over windows, records and files included, through the capture of stage `teacher`."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.gpu import materials
from bench.gpu.device import forget_peak, peak_bytes, synchronize
from bench.gpu.setting import Figures, Setting
from microlm.corpus.batches import evenly_spaced
from microlm.models.interface import LanguageModel
from microlm.research.plan.sizes import forward_flops
from microlm.teacher.capture import capture
from microlm.teacher.recorders import Recorder

TEACHERS = {"SmolLM2-135M": materials.smollm2, "OLMo-1B shape": materials.olmo_1b}


def run(setting: Setting) -> Figures:
    for name, load in TEACHERS.items():
        yield name, partial(_measure, setting, load)


def _measure(setting: Setting, load: Callable[[Setting], LanguageModel]) -> dict[str, float]:
    model, sizes = load(setting), setting.sizes
    batches = materials.batches_of(setting.config, Path("capture"), model.n_vocab, sizes.micro_batch_rows[0])
    whole = materials.identity_of(setting.config, batches, model.n_vocab)

    def labelled(windows: int, name: str) -> float:
        """Seconds."""
        identity = replace(whole, windows=min(windows, whole.windows))
        directory = Path("capture") / f"{name}-{model.n_vocab}"
        directory.mkdir()
        chosen = evenly_spaced(len(batches.windows), identity.windows)
        synchronize(setting.device)
        began = time.perf_counter()
        record = Recorder(model, identity, setting.runtime.compiled)
        capture(record, batches.shards, chosen, directory, sizes.capture_rows, int)
        synchronize(setting.device)
        return time.perf_counter() - began

    labelled(sizes.capture_rows, "warm-up")
    forget_peak(setting.device)
    windows = min(sizes.captured_windows, whole.windows)
    rate = windows * whole.seq_len / labelled(windows, "measured")
    config = model.network.config
    own = sum(parameter.numel() for parameter in model.parameters())
    flops = forward_flops(own, config.num_hidden_layers, config.hidden_size, whole.seq_len)
    return {
        "tokens_per_s": rate,
        "peak_bytes": peak_bytes(),
        "utilisation": rate * flops / 1e12 / setting.peak_tflops,
        "flops_per_token": flops,
        "bytes_per_token": whole.token_bytes,
    }
