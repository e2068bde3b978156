"""What the card itself does: bfloat16 products and memory. Everything else is given as a share of this."""

import torch

from bench.gpu.device import seconds_of
from bench.gpu.setting import Figures, Setting

REPEATS = 20


def run(setting: Setting) -> Figures:
    device, sizes = setting.device, setting.sizes
    squares = _product(setting, sizes.matrix, sizes.matrix, sizes.matrix)
    setting.book.about({"peak_tflops": squares["tflops"]})
    yield "square product", squares
    yield "head's product", _product(setting, sizes.head_rows[0], setting.shape().hidden_size, sizes.n_vocab)
    source = torch.ones(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, REPEATS)
    yield "copy", {"bytes": sizes.copied_bytes, "gb_per_s": 2 * sizes.copied_bytes / seconds / 1e9}


def _product(setting: Setting, m: int, k: int, n: int) -> dict[str, float]:
    """[m, k] times [k, n] in bfloat16, of numbers and not of zeros: those take less power and so are faster."""
    a, b = (torch.randn(size, device=setting.device, dtype=torch.bfloat16) for size in ((m, k), (k, n)))
    out = a.new_empty(m, n)
    seconds = seconds_of(lambda: torch.mm(a, b, out=out), setting.device, REPEATS, warm_up=3)
    return {"m": m, "k": k, "n": n, "tflops": 2 * m * k * n / seconds / 1e12}
