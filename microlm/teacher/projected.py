"""Records, table and losses of a teacher that reads other tokens than the student (see projection.py)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
from microlm.corpus.shards import TokenShards
from microlm.evaluation.validation import ValidationLoss
from microlm.language_model import LanguageModel
from microlm.objective.fused_head import token_nats
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.projection import Aligned, Projection

HEAD_ROWS = 256  # positions whose distributions exist at once


class ProjectedRecorder:
    """Turns windows into records, as `capture.Recorder` does, by way of the teacher's own tokens."""

    def __init__(self, model: LanguageModel, identity: CacheIdentity, projection: Projection) -> None:
        self.identity, self._projection = identity, projection
        self._weight = model.head_weight[: len(projection.first)].detach()

    def of_batch(self, model: LanguageModel, batch: Batch, device: torch.device) -> np.ndarray:
        """Records [B * L]. One that is not covered holds NaN, so that whoever does not heed its mark finds out."""
        aligned = self._projection.align(batch)
        hidden = _hidden(model, aligned, device)
        gold = batch.targets.flatten()[torch.from_numpy(aligned.covered)].to(device)
        records = np.zeros(len(aligned.covered), self.identity.record())
        for name in ("log_p", "log_tail", "gold"):
            records[name] = np.nan
        records["covered"] = aligned.covered
        places = np.flatnonzero(aligned.covered)
        for i in range(0, len(hidden), HEAD_ROWS):
            part = slice(i, i + HEAD_ROWS)
            records[places[part]] = self._records(hidden[part], gold[part])
        return records

    def add_batch(self, model: LanguageModel, batch: Batch, totals: Tensor) -> int:
        """Add to `totals`, float64 [temperatures, V], the distributions at covered positions; how many these are."""
        hidden = _hidden(model, self._projection.align(batch), totals.device)
        for part in hidden.split(HEAD_ROWS):
            for total, p in zip(totals, self._distributions(part)):
                total += p.sum(0, dtype=torch.float64)
        return len(hidden)

    def _distributions(self, hidden: Tensor) -> list[Tensor]:
        """At each temperature, float32 [n, V]."""
        z = torch.mm(hidden, self._weight.T).float()
        return [self._projection.push(torch.softmax(z / T, -1)) for T in self.identity.temperatures]

    def _records(self, hidden: Tensor, gold: Tensor) -> np.ndarray:
        k, least = self.identity.top_k, torch.finfo(torch.float32).tiny
        records = np.zeros(len(hidden), self.identity.record())
        for column, p in enumerate(self._distributions(hidden)):
            if self.identity.temperatures[column] == 1:
                records["gold"] = p.gather(1, gold[:, None])[:, 0].clamp_min(least).log().cpu().numpy()
            values, ids = p.topk(k)
            tail = p.scatter_(1, ids, 0).sum(-1)
            if k < self._projection.n_vocab:
                tail = tail.clamp_min(least)  # there is a tail, however little of it float32 sees
            records["ids"][:, column] = ids.cpu().numpy()
            # ids that no token of the teacher begins with have no mass
            records["log_p"][:, column] = values.clamp_min(least).log().cpu().numpy()
            records["log_tail"][:, column] = tail.log().cpu().numpy()
        records["covered"] = True
        return records


def _hidden(model: LanguageModel, aligned: Aligned, device: torch.device) -> Tensor:
    """Hidden states that speak of the covered positions, [n, D]."""
    return model.hidden(aligned.tokens.to(device)).flatten(0, 1)[aligned.states.to(device)]


def native_loss(
    model: LanguageModel,
    projection: Projection,
    shards: TokenShards,
    seq_len: int,
    windows: np.ndarray,
    rows: int,
    progress: Callable[[int], object] = int,
) -> ValidationLoss:
    """The teacher's loss in its own tokens on the text of `windows`, as `validation.loss_on` counts.

    A window's first token of the teacher's is not predicted, and what is beyond its context neither.

    Args:
        progress: told the windows done.
    """
    device = next(model.parameters()).device
    sums, lengths, tokens = [], [], 0
    with torch.inference_mode():
        for start in range(0, len(windows), rows):
            aligned = projection.align(read_batch(shards, windows[start : start + rows], seq_len))
            hidden = model.hidden(aligned.tokens.to(device)).flatten(0, 1)
            targets = aligned.targets.to(device).flatten()
            nats = token_nats(hidden, model.head_weight, targets, len(projection.first)).view(aligned.targets.shape)
            sums.append((nats.double().cpu().numpy() * aligned.real).sum(-1))
            lengths.append(aligned.target_bytes.sum(-1))
            tokens += int(aligned.real.sum())
            progress(len(aligned.real))
    return ValidationLoss(windows, np.concatenate(sums), np.concatenate(lengths).astype(np.int64), tokens)


def projected_loss(
    model: LanguageModel,
    identity: CacheIdentity,
    projection: Projection,
    shards: TokenShards,
    windows: np.ndarray,
    rows: int,
    byte_lengths: np.ndarray,
) -> tuple[ValidationLoss, float]:
    """The loss of the projected distributions on the covered positions of `windows`, in bytes of the student's tokens.

    Args:
        byte_lengths: int [V].

    Returns:
        It, with the covered positions as its tokens, and the share of positions at a shared boundary.
    """
    device, record = next(model.parameters()).device, ProjectedRecorder(model, identity, projection)
    sums, lengths, tokens, shared = [], [], 0, 0
    for start in range(0, len(windows), rows):
        batch = read_batch(shards, windows[start : start + rows], identity.seq_len)
        with torch.inference_mode():
            records = record.of_batch(model, batch, device).reshape(batch.targets.shape)
        said = records["covered"]
        sums.append(-np.where(said, records["gold"], 0).sum(-1, dtype=np.float64))
        lengths.append((byte_lengths[batch.targets.numpy()] * said).sum(-1))
        tokens += int(said.sum())
        shared += int(projection.align(batch).shared.sum())
    loss = ValidationLoss(windows, np.concatenate(sums), np.concatenate(lengths).astype(np.int64), tokens)
    return loss, shared / (len(windows) * identity.seq_len)
