"""What the teacher says of windows, as records: hidden states to the columns of records.py, whatever tokens it reads.

The tail's mass is a logsumexp over the logits that remain once the top k are masked out: never one minus a sum. The
vocabulary is the tokenizer's; padding rows of the head are masked first.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from microlm.corpus.batches import Batch
from microlm.corpus.tokenizer import Tokenizer
from microlm.errors import ParameterError, UserError
from microlm.models.interface import LanguageModel
from microlm.models.teacher_source import TeacherSource
from microlm.objective.divergences import SparseTeacher
from microlm.runtime.device import Runtime
from microlm.teacher.cache import CacheIdentity, sparse_teacher
from microlm.teacher.projection import Aligned, Projection
from microlm.teacher.records import Labels

# positions whose logits exist at once: on the CPU their block stays in the processor's cache, on CUDA a product of so
# many rows hides the launch of what follows it
HEAD_ROWS = {"cpu": 256, "cuda": 4096}
WIDEST = 2**16  # ids of a projected teacher; of one with more, fewer rows at once on CUDA
GROUPS = 768  # of the vocabulary, for the first pass of the top k
TINY = torch.finfo(torch.float32).tiny  # there is a tail, however little of it float32 sees

Said = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of n positions: ids and log_p [n, k], [n, T, k] where projected, log_tail [n, T], gold [n]."""


def head_rows(device: str, ids: int) -> int:
    """Positions whose logits over `ids` ids exist at once."""
    least = HEAD_ROWS["cpu"]
    return max(least, HEAD_ROWS.get(device, least) * WIDEST // max(ids, WIDEST))


def group_maxima(z: Tensor) -> Tensor:
    """[N, V] -> [N, GROUPS]: the largest logit of each group {j : j mod GROUPS = g}."""
    return z.view(z.shape[0], -1, GROUPS).amax(1)


def shifted_sum(z: Tensor, peak: Tensor, scale: float) -> Tensor:
    """sum_j exp(scale * (z_j - peak)), float32 [N]."""
    return torch.exp((z.float() - peak[:, None]) * scale).sum(-1)


def top_k(z: Tensor, k: int, maxima: Callable[[Tensor], Tensor] = group_maxima) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [N, V], V a multiple of GROUPS: values and ids [N, k].

    Each of the k largest lies in one of the k groups with the largest maxima, so that only those are searched.
    """
    if k > GROUPS:
        return z.topk(k)
    groups = maxima(z).topk(k).indices  # [N, k]
    members = torch.arange(0, z.shape[1], GROUPS, device=z.device)
    candidates = (groups[:, None, :] + members[None, :, None]).flatten(1)  # [N, k * V / GROUPS]
    values, places = z.gather(1, candidates).topk(k)
    return values, candidates.gather(1, places)


class Head:
    """The teacher's head over its own tokens, which are the corpus's; its weight is padded once to whole groups."""

    def __init__(self, model: LanguageModel, identity: CacheIdentity, rows: int, compiled: bool) -> None:
        self._identity = identity
        weight = model.head_weight[: identity.n_vocab].detach()
        padded = -(-identity.n_vocab // GROUPS) * GROUPS
        self._weight = torch.cat((weight, weight.new_zeros(padded - len(weight), weight.shape[1])))
        kernels = group_maxima, shifted_sum
        self._maxima, self._sum = (torch.compile(f, dynamic=False) for f in kernels) if compiled else kernels
        # bfloat16 logits of 16 to 32 are 0.06 to 0.125 apart, coarser than a record: CUDA's product can give float32
        wide = weight.device.type == "cuda" and weight.dtype != torch.float32
        self._wide = {"out_dtype": torch.float32} if wide else {}
        self._buffer = weight.new_empty(rows, padded, dtype=torch.float32 if wide else weight.dtype)

    def columns(self, hidden: Tensor, gold: Tensor) -> Said:
        """hidden [n, D], gold int64 [n], the text's own tokens."""
        z = self._logits(hidden)
        z[:, self._identity.n_vocab :] = -torch.inf
        gold = z.gather(1, gold[:, None])[:, 0].float()
        values, ids = top_k(z, self._identity.top_k, self._maxima)
        values = values.float()
        peak = values[:, 0].contiguous()
        z[torch.arange(len(z), device=z.device)[:, None], ids] = -torch.inf  # scatter_ would copy the whole block
        tails = {T: self._log_tail(z, peak, T) for T in self._identity.temperatures}
        log_normalizer = torch.logaddexp((values - peak[:, None]).logsumexp(-1), tails[1.0])  # relative to the peak
        log_tail = torch.stack([tail - log_normalizer / T for T, tail in tails.items()], -1)
        return ids, values - peak[:, None] - log_normalizer[:, None], log_tail, gold - peak - log_normalizer

    def distributions(self, hidden: Tensor) -> Iterator[Tensor]:
        """At each temperature, float32 [n, V]."""
        z = self._logits(hidden)[:, : self._identity.n_vocab].float()
        return (torch.softmax(z / temperature, -1) for temperature in self._identity.temperatures)

    def _logits(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, self._weight.T, **self._wide, out=self._buffer[: len(hidden)])

    def _log_tail(self, z: Tensor, peak: Tensor, temperature: float) -> Tensor:
        total = self._sum(z, peak, 1 / temperature)
        return (total.clamp_min(TINY) if self._identity.top_k < self._identity.n_vocab else total).log()


class ProjectedHead:
    """The same of a teacher that reads other tokens than the student (see projection.py)."""

    def __init__(self, model: LanguageModel, identity: CacheIdentity, projection: Projection) -> None:
        self._identity, self._projection = identity, projection
        self._weight = model.head_weight[: len(projection.first)].detach()

    def columns(self, hidden: Tensor, gold: Tensor) -> Said:
        k, columns = self._identity.top_k, []
        for temperature, p in zip(self._identity.temperatures, self.distributions(hidden)):
            if temperature == 1:
                gold_p = p.gather(1, gold[:, None])[:, 0]
            values, ids = p.topk(k)
            tail = p.scatter_(1, ids, 0).sum(-1)
            # ids that no token of the teacher begins with have no mass
            log_tail = (tail.clamp_min(TINY) if k < self._identity.n_vocab else tail).log()
            columns.append((ids, values.clamp_min(TINY).log(), log_tail))
        ids, log_p, log_tail = (torch.stack(parts, 1) for parts in zip(*columns))
        return ids, log_p, log_tail, gold_p.clamp_min(TINY).log()

    def distributions(self, hidden: Tensor) -> Iterator[Tensor]:
        z = torch.mm(hidden, self._weight.T).float()
        return (self._projection.push(torch.softmax(z / T, -1)) for T in self._identity.temperatures)


class Recorder:
    """Turns windows into records.

    Args:
        compiled: compile the passes over the teacher's logits.
        projection: of a teacher with another tokenizer than the shards'.
    """

    def __init__(
        self, model: LanguageModel, identity: CacheIdentity, compiled: bool, projection: Projection | None = None
    ) -> None:
        self.model, self.identity, self.projection = model, identity, projection
        self.device = model.head_weight.device
        self._rows = head_rows(self.device.type, len(projection.first) if projection else 0)
        if projection:
            self._head = ProjectedHead(model, identity, projection)
        else:
            self._head = Head(model, identity, self._rows, compiled)

    def align(self, batch: Batch) -> Aligned | None:
        """The part of a labelling that needs no model. None where the teacher's tokens are the batch's."""
        return self.projection.align(batch) if self.projection else None

    def label(self, batch: Batch, aligned: Aligned | None) -> Labels:
        """Labels of a batch, N = B * seq_len, on the model's device.

        One that is not covered holds NaN, so that whoever does not heed its mark finds out.
        """
        hidden, targets = self._hidden(batch, aligned), batch.targets.to(self.device).flatten()
        covered = None if aligned is None else torch.from_numpy(aligned.covered).to(self.device)
        gold = targets if covered is None else targets[covered]
        parts = [self._head.columns(*part) for part in zip(hidden.split(self._rows), gold.split(self._rows))]
        said = [torch.cat(column) for column in zip(*parts)]
        if covered is not None:
            said = [_spread(column, covered) for column in said]
        return Labels(self.identity.layout.pack(*said[:3], covered), said[3])

    def labels(self, batch: Batch) -> Labels:
        """`label`, for a loss. UserError where the teacher speaks and what it says is not finite."""
        with torch.no_grad():  # not inference mode: a loss keeps what is made of them for its backward pass
            labels = self.label(batch, self.align(batch))
        self.refuse_not_finite(labels, batch)
        return labels

    def refuse_not_finite(self, labels: Labels, batch: Batch) -> None:
        said = self.identity.layout.unpack(labels.rows)
        finite = said.log_p.isfinite().flatten(1).all(-1) & ~said.log_tail.isnan().any(-1) & labels.gold.isfinite()
        if not (finite if said.covered is None else finite | ~said.covered).all():
            raise UserError(
                f"the teacher's logits are not finite in windows {batch.windows.tolist()}; try runtime.dtype: float32"
            )

    def add_batch(self, totals: Tensor, batch: Batch, aligned: Aligned | None) -> int:
        """Add to `totals`, float64 [temperatures, V], the distributions at covered positions; how many these are."""
        hidden = self._hidden(batch, aligned)
        for part in hidden.split(self._rows):
            for total, p in zip(totals, self._head.distributions(part)):
                total += p.sum(0, dtype=torch.float64)
        return len(hidden)

    def _hidden(self, batch: Batch, aligned: Aligned | None) -> Tensor:
        """Hidden states that speak of the covered positions, [n, D]."""
        hidden = self.model.hidden((aligned or batch).tokens.to(self.device)).flatten(0, 1)
        return hidden if aligned is None else hidden[aligned.states.to(self.device)]


def _spread(column: Tensor, covered: Tensor) -> Tensor:
    """Of covered positions [n, ...] -> of all [N, ...], NaN (of ids 0) at the others."""
    whole = column.new_full((len(covered), *column.shape[1:]), torch.nan if column.is_floating_point() else 0)
    whole[covered] = column
    return whole


class LiveTeacher:
    """Answers as `TeacherCache` does, of any windows, by running the model each time it is asked.

    It passes through the records of the capture, their rounding and all: for a batch of the same composition the answer
    equals the cache's bit for bit.

    Args:
        tables: the cache's, or what `capture.tail_table` makes, [temperatures, V]. They are of no position.
    """

    def __init__(self, record: Recorder, tables: Tensor) -> None:
        self.identity, self._record, self._tables = record.identity, record, tables

    def of_batch(self, batch: Batch, temperature: float) -> SparseTeacher:
        """What the fused head wants of B windows, N = B * seq_len rows, on the batch's device.

        Raises:
            UserError: the teacher's logits are not finite, or the temperature is not one of the identity's.
        """
        self._tables = self._tables.to(batch.tokens.device)  # once, as in cache.py
        rows = self._record.labels(batch).rows.to(batch.tokens.device)
        return sparse_teacher(rows, self.identity, self._tables, temperature)


def load_fitting_teacher(source: TeacherSource, identity: CacheIdentity, runtime: Runtime) -> LanguageModel:
    """The teacher on the runtime's device.

    Raises:
        UserError: its weights are not there, or its vocabulary, context or tokenizer do not fit the corpus.
    """
    model = source.load(runtime.dtype)
    refuse_misfit(model, identity, source)
    return model.to(runtime.device)


def load_recorder(source: TeacherSource, identity: CacheIdentity, runtime: Runtime, student: Tokenizer) -> Recorder:
    """The teacher on the runtime's device, of any tokenizer, with its way to the corpus's, which is `student`.

    Raises:
        UserError: its weights or its tokenizer are not there, the two do not go together or cannot be run, or its
            context is shorter than the corpus's windows.
    """
    model, own, projection = source.load(runtime.dtype), source.tokenizer(), None
    if own.fingerprint == student.fingerprint:
        refuse_misfit(model, identity, source)
    else:
        _refuse_long_windows(model, identity)
        if own.n_vocab > len(model.head_weight):
            raise ParameterError(
                f"teacher.model: {identity.teacher} has a tokenizer of {own.n_vocab} "
                f"tokens and a head of {len(model.head_weight)}; choose a teacher whose two go together"
            )
        projection = Projection(own, student, model.context)
        identity = replace(identity, teacher_tokenizer=own.fingerprint)
    return Recorder(model.to(runtime.device), identity, runtime.compiled, projection)


def refuse_misfit(model: LanguageModel, identity: CacheIdentity, source: TeacherSource) -> None:
    """A teacher that is asked about the student's tokens speaks of them and of this corpus's windows, or is refused."""
    mend = "only stage `teacher` reads another tokenizer; choose a teacher and a corpus.tokenizer that go together"
    if model.n_vocab != identity.n_vocab:
        raise ParameterError(
            f"teacher.model: {identity.teacher} has {model.n_vocab} tokens, data/shards {identity.n_vocab}; {mend}"
        )
    _refuse_long_windows(model, identity)
    if source.tokenizer().fingerprint != identity.tokenizer:
        raise ParameterError(
            f"teacher.model: {identity.teacher} has another tokenizer than data/shards, which "
            f"corpus.tokenizer names; {mend}"
        )


def _refuse_long_windows(model: LanguageModel, identity: CacheIdentity) -> None:
    if identity.seq_len > model.context:
        raise ParameterError(
            f"batch.seq_len: {identity.seq_len} is more than the teacher's context of {model.context}; lower it"
        )
