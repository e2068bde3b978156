"""Run the teacher once over the windows that students will see, and write what it says as the top-k cache.

The tail's mass is a logsumexp over the logits that remain once the top k are masked out: never one minus a sum. The
vocabulary is the tokenizer's; padding rows of the head are masked first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from microlm import distributed
from microlm.corpus.batches import Batch, evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import atomic_file
from microlm.language_model import LanguageModel
from microlm.teacher.cache import TABLE, CacheIdentity, covered, is_finished, seal_file
from microlm.teacher.projected import ProjectedRecorder
from microlm.teacher.projection import Projection

HEAD_ROWS = 256  # positions whose logits exist at once: their block stays in the processor's cache
TABLE_WINDOWS = 32  # evenly spaced: the table is a mean of whole distributions, a few thousand positions fix it
GROUPS = 768  # of the vocabulary, for the first pass of the top k


def group_maxima(z: Tensor) -> Tensor:
    """[N, V] -> [N, GROUPS]: the largest logit of each group {j : j mod GROUPS = g}."""
    return z.view(z.shape[0], -1, GROUPS).amax(1)


def shifted_sum(z: Tensor, peak: Tensor, scale: float) -> Tensor:
    """sum_j exp(scale * (z_j - peak)), float32 [N]."""
    return torch.exp((z.float() - peak[:, None]) * scale).sum(-1)


@dataclass
class Kernels:
    group_maxima: Callable[[Tensor], Tensor] = group_maxima
    shifted_sum: Callable[[Tensor, Tensor, float], Tensor] = shifted_sum

    @classmethod
    def compiled(cls) -> "Kernels":
        return cls(torch.compile(group_maxima, dynamic=False), torch.compile(shifted_sum, dynamic=False))


def top_k(z: Tensor, k: int, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [N, V], V a multiple of GROUPS: values and ids [N, k].

    Each of the k largest lies in one of the k groups with the largest maxima, so that only those are searched.
    """
    if k > GROUPS:
        return z.topk(k)
    groups = kernels.group_maxima(z).topk(k).indices  # [N, k]
    members = torch.arange(0, z.shape[1], GROUPS, device=z.device)
    candidates = (groups[:, None, :] + members[None, :, None]).flatten(1)  # [N, k * V / GROUPS]
    values, places = z.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)


class Recorder:
    """Turns hidden states into records. The head's weight is padded once to whole groups."""

    def __init__(self, model: LanguageModel, identity: CacheIdentity, compiled: bool) -> None:
        weight = model.head_weight[: identity.n_vocab].detach()
        padded = -(-identity.n_vocab // GROUPS) * GROUPS
        self._weight = torch.cat((weight, weight.new_zeros(padded - len(weight), weight.shape[1])))
        self.identity = identity
        self._kernels = Kernels.compiled() if compiled else Kernels()
        self._buffer = weight.new_empty(HEAD_ROWS, padded)

    def of_batch(self, model: LanguageModel, batch: Batch, device: torch.device) -> np.ndarray:
        """Records of a batch, [B * seq_len]."""
        hidden = model.hidden(batch.tokens.to(device)).flatten(0, 1)
        return self(hidden, batch.targets.to(device).flatten())

    def add_batch(self, model: LanguageModel, batch: Batch, totals: Tensor) -> int:
        """Add to `totals`, float64 [temperatures, V], the distributions at all positions; how many these are."""
        hidden = model.hidden(batch.tokens.to(totals.device)).flatten(0, 1)
        self.add_distributions(hidden, totals)
        return len(hidden)

    def __call__(self, hidden: Tensor, targets: Tensor) -> np.ndarray:
        """hidden [N, D], targets int64 [N] -> records [N]."""
        chunks = range(0, len(hidden), HEAD_ROWS)
        return np.concatenate([self._chunk(hidden[i : i + HEAD_ROWS], targets[i : i + HEAD_ROWS]) for i in chunks])

    def _chunk(self, hidden: Tensor, targets: Tensor) -> np.ndarray:
        z = torch.mm(hidden, self._weight.T, out=self._buffer[: len(hidden)])
        z[:, self.identity.n_vocab :] = -torch.inf
        gold = z.gather(1, targets[:, None])[:, 0].float()
        values, ids = top_k(z, self.identity.top_k, self._kernels)
        values = values.float()
        peak = values[:, 0].contiguous()
        z[torch.arange(len(z), device=z.device)[:, None], ids] = -torch.inf  # scatter_ would copy the whole block
        tails = {T: self._log_tail(z, peak, T) for T in self.identity.temperatures}
        log_normalizer = torch.logaddexp((values - peak[:, None]).logsumexp(-1), tails[1.0])  # relative to the peak
        records = np.empty(len(hidden), self.identity.record())
        records["ids"] = ids.cpu().numpy()
        records["log_p"] = (values - peak[:, None] - log_normalizer[:, None]).cpu().numpy()
        records["log_tail"] = torch.stack([tail - log_normalizer / T for T, tail in tails.items()], -1).cpu().numpy()
        records["gold"] = (gold - peak - log_normalizer).cpu().numpy()
        return records

    def add_distributions(self, hidden: Tensor, totals: Tensor) -> None:
        """Add to `totals`, float64 [temperatures, V], the distributions at the positions of hidden [N, D]."""
        for start in range(0, len(hidden), HEAD_ROWS):
            z = torch.mm(hidden[start : start + HEAD_ROWS], self._weight.T)[:, : self.identity.n_vocab].float()
            for total, temperature in zip(totals, self.identity.temperatures):
                total += torch.softmax(z / temperature, -1).sum(0, dtype=torch.float64)

    def _log_tail(self, z: Tensor, peak: Tensor, temperature: float) -> Tensor:
        total = self._kernels.shifted_sum(z, peak, 1 / temperature)
        if self.identity.top_k < self.identity.n_vocab:
            total = total.clamp_min(torch.finfo(total.dtype).tiny)  # there is a tail, however little of it float32 sees
        return total.log()


def recorder(
    model: LanguageModel, identity: CacheIdentity, compiled: bool, projection: Projection | None
) -> Recorder | ProjectedRecorder:
    """What makes the records of `identity`."""
    return ProjectedRecorder(model, identity, projection) if projection else Recorder(model, identity, compiled)


def capture(
    model: LanguageModel,
    shards: TokenShards,
    windows: np.ndarray,
    identity: CacheIdentity,
    directory: Path,
    batch_rows: int,
    compiled: bool,
    progress: Callable[[int], object],
    projection: Projection | None = None,
) -> int:
    """Write every block that `directory` does not hold yet, each whole or not at all.

    Several processes deal the blocks among them: one writer a block, the first one writes the table. Killed at any
    moment and called again, it leaves the same bytes as a call that was not. `directory` is the caller's alone (see
    scratch.py).

    Args:
        progress: told the tokens of `dealt_blocks` done, those of blocks found on disk included.
        projection: of a teacher with another tokenizer than the shards'.

    Returns:
        Tokens that this call sent through the teacher, in all processes.
    """
    record = recorder(model, identity, compiled, projection)
    device = next(model.parameters()).device
    if distributed.is_first():
        for torn in directory.glob(".*.tmp"):  # of a killed call, which the disk may have no room for
            torn.unlink()
    distributed.wait_for_all()
    fresh = 0
    for name, part in dealt_blocks(identity):
        tokens = (part.stop - part.start) * identity.seq_len
        if is_finished(directory / name, tokens * identity.record().itemsize):
            progress(tokens)
            continue
        with atomic_file(directory / name) as file:
            for start in range(part.start, part.stop, batch_rows):
                chosen = windows[start : min(start + batch_rows, part.stop)]
                file.write(records_of(model, record, read_batch(shards, chosen, identity.seq_len), device).tobytes())
                progress(len(chosen) * identity.seq_len)
        seal_file(directory / name)
        fresh += tokens
    if distributed.is_first() and not is_finished(directory / TABLE, 4 * len(identity.temperatures) * identity.n_vocab):
        with atomic_file(directory / TABLE) as file:
            file.write(tail_table(model, record, shards, windows, batch_rows).tobytes())
        seal_file(directory / TABLE)
    return int(distributed.sum_over_ranks(torch.tensor(fresh)))  # which waits for the last block


def dealt_blocks(identity: CacheIdentity) -> Sequence[tuple[str, slice]]:
    """The blocks that this process writes, as `CacheIdentity.blocks` gives them."""
    return distributed.dealt(list(identity.blocks()))


def tail_table(
    model: LanguageModel,
    record: Recorder | ProjectedRecorder,
    shards: TokenShards,
    windows: np.ndarray,
    batch_rows: int,
) -> np.ndarray:
    """log of the mean probability of each token over all covered positions, float32 [temperatures, V]."""
    identity, device = record.identity, next(model.parameters()).device
    chosen = windows[evenly_spaced(len(windows), TABLE_WINDOWS)]
    totals = torch.zeros(len(identity.temperatures), identity.n_vocab, dtype=torch.float64, device=device)
    positions = 0
    with torch.inference_mode():
        for start in range(0, len(chosen), batch_rows):
            batch = read_batch(shards, chosen[start : start + batch_rows], identity.seq_len)
            positions += record.add_batch(model, batch, totals)
    mean = totals / max(1, positions)
    return mean.clamp_min(torch.finfo(torch.float32).tiny).log().float().cpu().numpy()


def records_of(
    model: LanguageModel, record: Recorder | ProjectedRecorder, batch: Batch, device: torch.device
) -> np.ndarray:
    """Records of a batch, [B * seq_len], with non-finite ones refused where the teacher speaks."""
    with torch.inference_mode():
        records = record.of_batch(model, batch, device)
    said = records[covered(records)]
    if not (np.isfinite(said["log_p"]).all() and np.isfinite(said["gold"]).all()):
        raise UserError(
            f"the teacher's logits are not finite in windows {batch.windows.tolist()}; try runtime.dtype: float32"
        )
    return records
