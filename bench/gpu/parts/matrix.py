"""What the card itself does: bfloat16 products and memory. Everything else is given as a share of this."""

import torch

from bench.gpu.device import seconds_of
from bench.gpu.setting import Figures, Setting

REPEATS = 20


def run(setting: Setting) -> Figures:
    device, sizes = setting.device, setting.sizes
    yield "square product", lambda: _peak(setting)
    yield "head's product", lambda: _product(setting, sizes.head_rows[0], setting.shape().hidden_size, sizes.n_vocab)
    yield "copy", lambda: _copy(sizes.copied_bytes, device)


def _peak(setting: Setting) -> dict[str, float]:
    """What everything else is a share of."""
    found = _product(setting, *3 * (setting.sizes.matrix,))
    setting.book.about({"peak_tflops": found["tflops"]})
    return found


def _copy(size: int, device: torch.device) -> dict[str, float]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, REPEATS)
    return {"copied_bytes": size, "gb_per_s": 2 * size / seconds / 1e9}


def _product(setting: Setting, m: int, k: int, n: int) -> dict[str, float]:
    """[m, k] times [k, n] in bfloat16, of numbers and not of zeros: those take less power and so are faster."""
    a, b = (torch.randn(size, device=setting.device, dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    out = a.new_empty(m, n)
    seconds = seconds_of(lambda: torch.mm(a, b, out=out), setting.device, REPEATS, warm_up=3)
    return {"m": m, "k": k, "n": n, "tflops": 2 * m * k * n / seconds / 1e12}
