"""Records, table and losses of a teacher that reads other tokens than the student (see projection.py)."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, read_batch
from microlm.corpus.shards import TokenShards
from microlm.evaluation.scoring.held_out_loss import ValidationLoss
from microlm.models.interface import LanguageModel
from microlm.objective.fused_head import token_nats
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.projection import Aligned, Projection
from microlm.teacher.records import Labels

HEAD_ROWS = {"cpu": 256, "cuda": 4096}  # positions whose distributions exist at once, as in capture.py


class Read(NamedTuple):
    """A batch as the teacher will read it."""

    batch: Batch
    aligned: Aligned | None  # None where the teacher's tokens are the batch's


class ProjectedRecorder:
    """Turns windows into records, as `capture.Recorder` does, by way of the teacher's own tokens."""

    def __init__(self, model: LanguageModel, identity: CacheIdentity, projection: Projection) -> None:
        self.identity, self._projection = identity, projection
        self._weight = model.head_weight[: len(projection.first)].detach()
        self._rows = HEAD_ROWS.get(self._weight.device.type, HEAD_ROWS["cpu"])

    def read(self, batch: Batch) -> Read:
        return Read(batch, self._projection.align(batch))

    def label(self, model: LanguageModel, read: Read) -> Labels:
        """Labels, N = B * L. One that is not covered holds NaN, so that whoever does not heed its mark finds out."""
        aligned, device = read.aligned, self._weight.device
        covered = torch.from_numpy(aligned.covered)
        places = covered.nonzero()[:, 0]
        hidden, places = _hidden(model, aligned, device), places.to(device)
        targets = read.batch.targets.to(device).flatten()[places]
        head = (len(covered), len(self.identity.temperatures), self.identity.top_k)
        ids = torch.zeros(head, dtype=torch.int64, device=device)
        log_p = torch.full(head, torch.nan, device=device)
        log_tail, gold = torch.full_like(log_p[:, :, 0], torch.nan), torch.full_like(log_p[:, 0, 0], torch.nan)
        for i in range(0, len(hidden), self._rows):
            part = slice(i, i + self._rows)
            at = places[part]
            ids[at], log_p[at], log_tail[at], gold[at] = self._columns(hidden[part], targets[part])
        return Labels(self.identity.layout.pack(ids, log_p, log_tail, covered.to(device)), gold)

    def add_batch(self, model: LanguageModel, read: Read, totals: Tensor) -> int:
        """Add to `totals`, float64 [temperatures, V], the distributions at covered positions; how many these are."""
        hidden = _hidden(model, read.aligned, totals.device)
        for part in hidden.split(self._rows):
            for total, p in zip(totals, self._distributions(part)):
                total += p.sum(0, dtype=torch.float64)
        return len(hidden)

    def _distributions(self, hidden: Tensor) -> list[Tensor]:
        """At each temperature, float32 [n, V]."""
        z = torch.mm(hidden, self._weight.T).float()
        return [self._projection.push(torch.softmax(z / T, -1)) for T in self.identity.temperatures]

    def _columns(self, hidden: Tensor, gold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and log_p [n, temperatures, k], log_tail [n, temperatures], gold [n]."""
        k, least = self.identity.top_k, torch.finfo(torch.float32).tiny
        columns = []
        for temperature, p in zip(self.identity.temperatures, self._distributions(hidden)):
            if temperature == 1:
                gold_p = p.gather(1, gold[:, None])[:, 0]
            values, ids = p.topk(k)
            tail = p.scatter_(1, ids, 0).sum(-1)
            if k < self._projection.n_vocab:
                tail = tail.clamp_min(least)  # there is a tail, however little of it float32 sees
            # ids that no token of the teacher begins with have no mass
            columns.append((ids, values.clamp_min(least).log(), tail.log()))
        ids, log_p, log_tail = (torch.stack(parts, 1) for parts in zip(*columns))
        return ids, log_p, log_tail, gold_p.clamp_min(least).log()


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
    record = ProjectedRecorder(model, identity, projection)
    sums, lengths, tokens, shared = [], [], 0, 0
    for start in range(0, len(windows), rows):
        read = record.read(read_batch(shards, windows[start : start + rows], identity.seq_len))
        with torch.inference_mode():
            gold = record.label(model, read).gold.cpu().numpy()
        targets = read.batch.targets.numpy()
        said, gold = read.aligned.covered.reshape(targets.shape), gold.reshape(targets.shape)
        sums.append(-np.where(said, gold, 0).sum(-1, dtype=np.float64))
        lengths.append((byte_lengths[targets] * said).sum(-1))
        tokens += int(said.sum())
        shared += int(read.aligned.shared.sum())
    loss = ValidationLoss(windows, np.concatenate(sums), np.concatenate(lengths).astype(np.int64), tokens)
    return loss, shared / (len(windows) * identity.seq_len)
