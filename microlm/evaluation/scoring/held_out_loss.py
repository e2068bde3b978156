"""Loss of a model on whole windows, in nats per token and in bits per byte of text; the texts that are held out."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from microlm.corpus.batches import evenly_spaced, read_batch, window_count
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.models.interface import LanguageModel
from microlm.objective.fused_head import token_nats
from microlm.parameters import ScaleConfig
from microlm.runtime import distributed
from microlm.runtime.paths import OUTSIDE, SHARDS


@dataclass(frozen=True)
class ValidationLoss:
    """Sums over each window; the text's end-of-text tokens cost nats and hold no bytes."""

    windows: np.ndarray  # int64 [W]
    window_nats: np.ndarray  # float64 [W]
    window_bytes: np.ndarray  # int64 [W]
    tokens: int

    @property
    def nats(self) -> float:
        """Per token."""
        return float(self.window_nats.sum() / self.tokens)

    @property
    def bpb(self) -> float:
        """Bits per byte: comparable across tokenizers, unlike nats per token."""
        return float(self.window_nats.sum() / math.log(2) / self.window_bytes.sum())


def held_out(at: ScaleConfig, corpus: Path = SHARDS, outside: Path = OUTSIDE) -> dict[str, TokenShards]:
    """`val`, the corpus's validation split, and `outside`, text of another kind where `evaluation.outside` names one.

    Raises:
        UserError: one is absent, damaged, or `outside` is of another tokenizer than the corpus.
    """
    found = {"val": TokenShards(corpus, "val")}
    if at.evaluation.outside is None:
        return found
    found["outside"] = TokenShards(outside, "outside")
    if found["outside"].manifest["tokenizer"] != found["val"].manifest["tokenizer"]:
        raise UserError(f"{outside} is of another tokenizer than {corpus}; make it again with: dvc repro -f -s outside")
    return found


@contextmanager
def scoring(model: LanguageModel) -> Iterator[torch.device]:
    """Inference mode and evaluation mode; afterwards each module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield next(iter(model.parameters())).device
    finally:
        for module, training in modes:
            module.training = training


def loss_on(
    model: LanguageModel,
    shards: TokenShards,
    byte_lengths: np.ndarray,
    seq_len: int,
    windows: np.ndarray | int | None,
    batch_rows: int,
    progress: Callable[[int], object] = int,
    together: bool = False,
) -> ValidationLoss:
    """Score `windows`, int64 [W], or as many evenly spaced ones of the split (None: all of them).

    Args:
        byte_lengths: int [V], bytes of text behind each token.
        progress: told the windows done.
        together: whole batches are dealt to the processes, which all call this, and each gets all: the bits of one.

    Raises:
        UserError: a loss is not finite.
    """
    if not isinstance(windows, np.ndarray):
        available = window_count(shards, seq_len)
        windows = evenly_spaced(available, windows or available)
    sums = np.zeros((2, len(windows)))  # nats, bytes
    starts, waiting = range(0, len(windows), batch_rows), len(windows)
    with scoring(model) as device:
        for start in distributed.dealt(starts) if together else starts:
            batch = read_batch(shards, windows[start : start + batch_rows], seq_len)
            hidden = model.hidden(batch.tokens.to(device)).flatten(0, 1)
            targets = batch.targets.to(device).flatten()
            nats = token_nats(hidden, model.head_weight, targets, model.n_vocab).view(batch.targets.shape)
            here = slice(start, start + batch_rows)
            sums[0, here] = nats.double().sum(-1).cpu().numpy()
            sums[1, here] = byte_lengths[batch.targets.numpy()].sum(-1)
            progress(len(batch.tokens))
            waiting -= len(batch.tokens)
    if together:
        progress(waiting)  # those of the others
        sums = distributed.sum_over_ranks(torch.from_numpy(sums)).numpy()  # each window is of one process, so exact
    result = ValidationLoss(windows, sums[0], sums[1].astype(np.int64), len(windows) * seq_len)
    if not np.isfinite(result.window_nats).all():
        raise UserError(
            f"the loss is not finite in {shards.split} window {windows[~np.isfinite(result.window_nats)][0]}; "
            "the weights hold NaN or infinity: lower the learning rate and train again"
        )
    return result
