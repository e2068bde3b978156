"""Run the teacher once over the windows that students will see, and write what it says as the top-k cache.

The tail's mass is a logsumexp over the logits that remain once the top k are masked out: never one minus a sum. The
vocabulary is the tokenizer's; padding rows of the head are masked first.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from microlm.corpus.batches import Batch, evenly_spaced, read_batch
from microlm.corpus.shards import TokenShards
from microlm.errors import UserError
from microlm.files import atomic_file
from microlm.models.interface import LanguageModel
from microlm.runtime import distributed
from microlm.teacher.cache import TABLE, CacheIdentity, is_finished, seal_file
from microlm.teacher.projected_teacher import ProjectedRecorder, Read
from microlm.teacher.projection import Projection
from microlm.teacher.records import Labels

T = TypeVar("T")
# positions whose logits exist at once: on the CPU their block stays in the processor's cache, on CUDA a product of so
# many rows hides the launch of what follows it
HEAD_ROWS = {"cpu": 256, "cuda": 4096}
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
        self._rows = HEAD_ROWS.get(weight.device.type, HEAD_ROWS["cpu"])
        # bfloat16 logits of 16 to 32 are 0.06 to 0.125 apart, coarser than a record: CUDA's product can give float32
        self._wide = weight.device.type == "cuda" and weight.dtype != torch.float32
        self._buffer = weight.new_empty(self._rows, padded, dtype=torch.float32 if self._wide else weight.dtype)

    def read(self, batch: Batch) -> Read:
        """The part of a batch's labelling that needs no model."""
        return Read(batch, None)

    def label(self, model: LanguageModel, read: Read) -> Labels:
        """Records of a batch, N = B * seq_len, on the model's device."""
        hidden, device = self._hidden(model, read)
        return self(hidden, read.batch.targets.to(device).flatten())

    def add_batch(self, model: LanguageModel, read: Read, totals: Tensor) -> int:
        """Add to `totals`, float64 [temperatures, V], the distributions at all positions; how many these are."""
        hidden, _ = self._hidden(model, read)
        self.add_distributions(hidden, totals)
        return len(hidden)

    def _hidden(self, model: LanguageModel, read: Read) -> tuple[Tensor, torch.device]:
        device = self._weight.device
        return model.hidden(read.batch.tokens.to(device)).flatten(0, 1), device

    def __call__(self, hidden: Tensor, targets: Tensor) -> Labels:
        """hidden [N, D], targets int64 [N]."""
        chunks = [slice(i, i + self._rows) for i in range(0, len(hidden), self._rows)]
        ids, log_p, log_tail, gold = (
            torch.cat(parts) for parts in zip(*(self._chunk(hidden[chunk], targets[chunk]) for chunk in chunks))
        )
        return Labels(self.identity.layout.pack(ids, log_p, log_tail), gold)

    def _chunk(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and log_p [n, k], log_tail [n, temperatures], gold [n]."""
        z = self._logits(hidden)
        z[:, self.identity.n_vocab :] = -torch.inf
        gold = z.gather(1, targets[:, None])[:, 0].float()
        values, ids = top_k(z, self.identity.top_k, self._kernels)
        values = values.float()
        peak = values[:, 0].contiguous()
        z[torch.arange(len(z), device=z.device)[:, None], ids] = -torch.inf  # scatter_ would copy the whole block
        tails = {T: self._log_tail(z, peak, T) for T in self.identity.temperatures}
        log_normalizer = torch.logaddexp((values - peak[:, None]).logsumexp(-1), tails[1.0])  # relative to the peak
        log_tail = torch.stack([tail - log_normalizer / T for T, tail in tails.items()], -1)
        return ids, values - peak[:, None] - log_normalizer[:, None], log_tail, gold - peak - log_normalizer

    def _logits(self, hidden: Tensor) -> Tensor:
        buffer = self._buffer[: len(hidden)]
        if self._wide:
            return torch.mm(hidden, self._weight.T, out_dtype=torch.float32, out=buffer)
        return torch.mm(hidden, self._weight.T, out=buffer)

    def add_distributions(self, hidden: Tensor, totals: Tensor) -> None:
        """Add to `totals`, float64 [temperatures, V], the distributions at the positions of hidden [N, D]."""
        for start in range(0, len(hidden), self._rows):
            z = self._logits(hidden[start : start + self._rows])[:, : self.identity.n_vocab].float()
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
    """Write every block that `directory` does not hold yet, each whole or not at all, and the table.

    Several processes deal the blocks among them: one writer a block, the first one writes the table. Killed at any
    moment and called again, it leaves the same bytes as a call that was not. `directory` is the caller's alone (see
    resume.py). For a teacher whose source is live the table is all.

    Args:
        progress: told the tokens of `dealt_blocks` done, those of blocks found on disk included.
        projection: of a teacher with another tokenizer than the shards'.

    Returns:
        Tokens that this call sent through the teacher, in all processes.
    """
    record = recorder(model, identity, compiled, projection)
    if distributed.is_first():
        for torn in directory.glob(".*.tmp"):  # of a killed call, which the disk may have no room for
            torn.unlink()
    distributed.wait_for_all()
    fresh = 0
    for name, part in dealt_blocks(identity):
        tokens = (part.stop - part.start) * identity.seq_len
        if is_finished(directory / name, tokens * identity.token_bytes):
            progress(tokens)
            continue
        with atomic_file(directory / name) as file:
            sums = _write_block(file, labelled(model, record, shards, windows[part], batch_rows), identity, progress)
        seal_file(directory / name, **sums)
        fresh += tokens
    if distributed.is_first() and not is_finished(directory / TABLE, 4 * len(identity.temperatures) * identity.n_vocab):
        table = tail_table(model, record, shards, windows, batch_rows).tobytes()
        with atomic_file(directory / TABLE) as file:
            file.write(table)
        seal_file(directory / TABLE, hashlib.sha256(table).hexdigest())
    return int(distributed.sum_over_ranks(torch.tensor(fresh)))  # which waits for the last block


def _write_block(
    file: IO[bytes], batches: Iterable["HostLabels"], identity: CacheIdentity, progress: Callable[[int], object]
) -> dict[str, object]:
    """Records, then the gold column; returns what `seal_file` is told, the sha256 among it."""
    sha256, gold, covered, head_mass = hashlib.sha256(), [], 0, 0.0
    at = identity.temperatures.index(1.0)

    def write(content: bytes) -> None:
        file.write(content)
        sha256.update(content)

    for labels in batches:
        write(labels.rows.numpy().tobytes())
        said = identity.layout.unpack(labels.rows)
        mass = 1 - said.log_tail[:, at].double().exp()
        head_mass += float(mass.sum() if said.covered is None else mass[said.covered].sum())
        covered += len(mass) if said.covered is None else int(said.covered.sum())
        gold.append(labels.gold.numpy())
        progress(len(mass))
    write(np.concatenate(gold).tobytes())
    return {"sha256": sha256.hexdigest(), "covered": covered, "head_mass": head_mass}


def dealt_blocks(identity: CacheIdentity) -> Sequence[tuple[str, slice]]:
    """The blocks that this process writes, as `CacheIdentity.blocks` gives them."""
    return distributed.dealt(list(identity.blocks())) if identity.source == "cache" else []


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
            positions += record.add_batch(model, record.read(batch), totals)
    mean = totals / max(1, positions)
    return mean.clamp_min(torch.finfo(torch.float32).tiny).log().float().cpu().numpy()


def labels_of(model: LanguageModel, record: Recorder | ProjectedRecorder, batch: Batch) -> Labels:
    """Labels of a batch on the model's device, with non-finite ones refused where the teacher speaks."""
    with torch.no_grad():  # not inference mode: a loss keeps what is made of them for its backward pass
        labels = record.label(model, record.read(batch))
    _refuse_not_finite(labels, record.identity, batch.windows)
    return labels


class HostLabels(NamedTuple):
    """Labels in main memory; from CUDA they are there once `arrived` is."""

    rows: Tensor
    gold: Tensor
    windows: np.ndarray
    arrived: torch.cuda.Event | None


def labelled(
    model: LanguageModel, record: Recorder | ProjectedRecorder, shards: TokenShards, windows: np.ndarray, rows: int
) -> Iterator[HostLabels]:
    """Labels of `windows`, `rows` windows at a time, non-finite ones refused.

    On CUDA a batch is read ahead in a thread, and one is handed out while the card is at work on the next.
    """
    cuda = next(model.parameters()).device.type == "cuda"
    parts = (windows[start : start + rows] for start in range(0, len(windows), rows))
    reads = (record.read(read_batch(shards, part, record.identity.seq_len)) for part in parts)
    waiting: deque[HostLabels] = deque()
    for read in ahead(reads) if cuda else reads:
        with torch.inference_mode():
            waiting.append(_to_host(record.label(model, read), read.batch.windows))
        if len(waiting) > cuda:
            yield _arrived(waiting.popleft(), record.identity)
    while waiting:
        yield _arrived(waiting.popleft(), record.identity)


def _to_host(labels: Labels, windows: np.ndarray) -> HostLabels:
    if labels.rows.device.type != "cuda":
        return HostLabels(labels.rows, labels.gold, windows, None)
    rows, gold = (torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in labels)
    rows.copy_(labels.rows, non_blocking=True)
    gold.copy_(labels.gold, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return HostLabels(rows, gold, windows, arrived)


def _arrived(labels: HostLabels, identity: CacheIdentity) -> HostLabels:
    if labels.arrived is not None:
        labels.arrived.synchronize()
    _refuse_not_finite(Labels(labels.rows, labels.gold), identity, labels.windows)
    return labels


def _refuse_not_finite(labels: Labels, identity: CacheIdentity, windows: np.ndarray) -> None:
    said = identity.layout.unpack(labels.rows)
    finite = said.log_p.isfinite().flatten(1).all(-1) & ~said.log_tail.isnan().any(-1) & labels.gold.isfinite()
    if not (finite if said.covered is None else finite | ~said.covered).all():
        raise UserError(
            f"the teacher's logits are not finite in windows {windows.tolist()}; try runtime.dtype: float32"
        )


def ahead(items: Iterator[T]) -> Iterator[T]:
    """`items`, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as reader:
        end = object()
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item
