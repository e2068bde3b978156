"""The LM head and the loss in one, block by block over the vocabulary, the gradient in the same call.

[tokens, vocabulary] never exists whole: a block of logits is made, read and dropped while it is in the processor's
cache. Two sweeps: the first gathers each row's normalizer, gold logit and logits of the cached ids; the second makes
the logits again and turns them into gradients. The extra matrix product costs less than keeping the logits (compare
Wijmans et al. 2024, "Cut your losses in large-vocabulary language models", arXiv:2411.09009, for cross-entropy alone).

A lumped divergence sees a row through k + 1 numbers: the logits of the cached ids and the tail's logsumexp. Autograd
differentiates it there, on [N, k + 1]; its gradient on a tail token j is that on the tail's logsumexp times
softmax_tail(j).

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.divergences import DIVERGENCES

BLOCK_ELEMENTS = 2**22  # of one block of logits: 8 MiB in bfloat16
LOWEST = -1e30  # below any logit, and finite, so that no difference of infinities arises


@dataclass(frozen=True)
class SparseTeacher:
    """What the cache says of N positions."""

    ids: Tensor  # int64 [N, k], distinct in each row
    log_p: Tensor  # float [N, k + 1] at the objective's temperature, the tail's log-mass last


@dataclass(frozen=True)
class Objective:
    """(1 - alpha) CE + alpha T^2 D(teacher, student at temperature T) + z_loss * logsumexp^2."""

    alpha: float = 0.0
    divergence: str = "rkl"
    temperature: float = 1.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class HeadLoss:
    """`loss` carries the gradient; the other two are sums over the N tokens, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def update_statistics(z: Tensor, scale: float, peak: Tensor, total: Tensor) -> None:
    """Online logsumexp of scale * z along rows: exp(peak) * total is the sum so far. In place on `peak` and `total`."""
    scaled = z.to(peak.dtype) * scale
    raised = torch.maximum(peak, scaled.amax(-1))
    total.copy_(total * torch.exp(peak - raised) + torch.exp(scaled - raised[:, None]).sum(-1))
    peak.copy_(raised)


def write_gradient(z: Tensor, log_normalizer: Tensor, weight: Tensor) -> None:
    """z_ij <- weight_i * exp(z_ij - log_normalizer_i), in place."""
    z.copy_(torch.exp(z.to(weight.dtype) - log_normalizer[:, None]) * weight[:, None])


def write_tempered_gradient(
    z: Tensor, log_normalizer: Tensor, weight: Tensor, scale: float, log_tail: Tensor, tail_weight: Tensor
) -> None:
    """z_ij <- weight_i exp(z_ij - log_normalizer_i) + tail_weight_i exp(scale z_ij - log_tail_i), in place."""
    exact = z.to(weight.dtype)
    plain = torch.exp(exact - log_normalizer[:, None]) * weight[:, None]
    z.copy_(plain + torch.exp(exact * scale - log_tail[:, None]) * tail_weight[:, None])


_KERNELS: dict[str, Callable[..., None]] = {
    kernel.__name__: kernel for kernel in (update_statistics, write_gradient, write_tempered_gradient)
}


def compile_kernels() -> None:
    """Compile the passes over a block of logits: each becomes one read (and one write) of the block."""
    for kernel in (update_statistics, write_gradient, write_tempered_gradient):
        _KERNELS[kernel.__name__] = torch.compile(kernel)  # evaluation brings other shapes


class _Entries:
    """Single entries (row, id) of the [N, V] logits, grouped by the block of the vocabulary that holds them."""

    def __init__(self, ids: Tensor, block: int, n_vocab: int) -> None:
        width = ids.shape[1]
        flat = ids.reshape(-1)
        blocks, order = torch.sort(flat // block, stable=True)
        edges = torch.arange(0, (n_vocab + block - 1) // block + 1, device=ids.device)
        self._edges = torch.searchsorted(blocks, edges).tolist()
        self._order = order
        self._rows = order // width
        self._columns = flat[order] % block

    def at(self, block_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns inside the block, and places in the flattened ids."""
        chosen = slice(self._edges[block_index], self._edges[block_index + 1])
        return self._rows[chosen], self._columns[chosen], self._order[chosen]


@dataclass
class _Statistics:
    """What the first sweep leaves of each row."""

    log_normalizer: Tensor  # [N] logsumexp over the vocabulary
    gold: Tensor  # [N] logit of the target
    head: Tensor | None  # [N, k] logits of the cached ids
    log_tail: Tensor | None  # [N] logsumexp of z / T over all other ids


class _Head:
    """The logits of N tokens as a stream of blocks over the vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, n_vocab: int) -> None:
        self.hidden, self.n_vocab = hidden, n_vocab
        self.weight = weight[:n_vocab].to(hidden.dtype)
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        fitting = BLOCK_ELEMENTS // max(1, hidden.shape[0]) // 256 * 256
        self.block = max(256, min(fitting, 16384))

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Index, slice of the vocabulary and logits [N, block]; the next block reuses the memory."""
        buffer = self.hidden.new_empty(self.hidden.shape[0] * self.block)
        for index, start in enumerate(range(0, self.n_vocab, self.block)):
            part = slice(start, min(start + self.block, self.n_vocab))
            z = buffer[: self.hidden.shape[0] * (part.stop - part.start)].view(self.hidden.shape[0], -1)
            yield index, part, torch.mm(self.hidden, self.weight[part].T, out=z)

    def sweep(self, gold: "_Entries", head: "_Entries | None", width: int, temperature: float) -> _Statistics:
        rows = self.hidden.shape[0]
        update = _KERNELS["update_statistics"]

        def accumulators() -> tuple[Tensor, Tensor]:
            return self.hidden.new_full((rows,), LOWEST, dtype=self.exact), self.hidden.new_zeros(
                rows, dtype=self.exact
            )

        peak, total = accumulators()
        tempered = accumulators() if head is not None and temperature != 1 else None
        gold_logits = self.hidden.new_empty(rows, dtype=self.exact)
        head_logits = self.hidden.new_empty(rows * width, dtype=self.exact) if head is not None else None
        for index, _, z in self.blocks():
            r, c, places = gold.at(index)
            gold_logits[places] = z[r, c].to(self.exact)
            if head is not None:
                r, c, places = head.at(index)
                head_logits[places] = z[r, c].to(self.exact)
                z[r, c] = -torch.inf  # what is left of the row is the tail
            update(z, 1.0, peak, total)
            if tempered is not None:
                update(z, 1.0 / temperature, *tempered)
        log_normalizer = peak + total.log()
        if head is None:
            return _Statistics(log_normalizer, gold_logits, None, None)
        head_logits = head_logits.view(rows, width)
        log_tail = log_normalizer if tempered is None else tempered[0] + tempered[1].log()
        log_normalizer = torch.logaddexp(log_normalizer, head_logits.logsumexp(-1))
        return _Statistics(log_normalizer, gold_logits, head_logits, log_tail)


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Cross-entropy of each token, nats [N], without a gradient. Arguments as `fused_head_loss`."""
    with torch.no_grad():
        head = _Head(hidden, weight, n_vocab)
        statistics = head.sweep(_Entries(targets[:, None], head.block, n_vocab), None, 0, 1.0)
        return statistics.log_normalizer - statistics.gold


def fused_head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    objective: Objective,
    teacher: SparseTeacher | None = None,
    count: int = 1,
) -> HeadLoss:
    """Loss summed over tokens and divided by `count`, and through autograd its gradient on `hidden` and `weight`.

    Args:
        hidden: [N, D]; its dtype is that of the matrix products. Sums and losses are float32 (float64 for float64).
        weight: LM head [padded vocabulary, D], float32; rows from `n_vocab` on are padding and never seen.
        targets: int64 [N], gold tokens.
        objective: alpha = 0 needs no teacher and is plain cross-entropy, bit for bit.
        teacher: the cache's records of these positions; needed where alpha > 0.
        count: tokens of the whole step, where these N are one of its parts.
    """
    if objective.alpha > 0 and teacher is None:
        raise ValueError("alpha > 0 needs a teacher")
    loss, cross_entropy, divergence = _FusedHead.apply(hidden, weight, targets, n_vocab, objective, teacher, count)
    return HeadLoss(loss, cross_entropy, divergence)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n_vocab, objective, teacher, count):
        head = _Head(hidden, weight, n_vocab)
        gold = _Entries(targets[:, None], head.block, n_vocab)
        distilling = objective.alpha > 0
        cached = _Entries(teacher.ids, head.block, n_vocab) if distilling else None
        width = teacher.ids.shape[1] if distilling else 0
        rows = head.sweep(gold, cached, width, objective.temperature)

        nats = rows.log_normalizer - rows.gold
        ce_weight = (1.0 - objective.alpha) / count
        loss = ce_weight * nats.sum()
        q_weight = torch.full_like(nats, ce_weight)  # of softmax(z) in the gradient
        if objective.z_loss:
            loss = loss + objective.z_loss / count * rows.log_normalizer.square().sum()
            q_weight = q_weight + 2 * objective.z_loss / count * rows.log_normalizer
        divergence, slopes = nats.new_zeros(()), None
        if distilling:
            kd_weight = objective.alpha * objective.temperature**2 / count
            divergence, *slopes = _lumped(rows, teacher, objective, kd_weight)
            loss = loss + kd_weight * divergence
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(*_gradients(head, rows, gold, cached, q_weight, ce_weight, slopes, objective, weight))
        ctx.mark_non_differentiable(divergence)
        return loss, nats.sum(), divergence

    @staticmethod
    def backward(ctx, loss_slope, *_):
        scale = loss_slope.item()
        return *(g if scale == 1 else g * scale for g in ctx.saved_tensors), None, None, None, None, None


def _lumped(
    rows: _Statistics, teacher: SparseTeacher, objective: Objective, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence summed over rows, and the slopes of `weight` times it on the cached ids' logits [N, k] and on z / T's
    tail logsumexp [N].
    """
    with torch.enable_grad():
        head = rows.head.detach().requires_grad_()
        log_tail = rows.log_tail.detach().requires_grad_()
        symbols = torch.cat((head / objective.temperature, log_tail[:, None]), dim=-1)
        log_q = symbols - symbols.logsumexp(-1, keepdim=True)
        divergence = DIVERGENCES[objective.divergence](teacher.log_p.to(log_q.dtype), log_q).sum()
        return divergence.detach(), *torch.autograd.grad(weight * divergence, (head, log_tail))


def _gradients(
    head: _Head,
    rows: _Statistics,
    gold: _Entries,
    cached: _Entries | None,
    q_weight: Tensor,
    ce_weight: float,
    slopes: list[Tensor] | None,
    objective: Objective,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The second sweep: logits again, turned into their gradients, and those into gradients of hidden and weight."""
    hidden_gradient = torch.zeros(head.hidden.shape, dtype=head.exact, device=head.hidden.device)
    weight_gradient = torch.empty_like(weight)
    weight_gradient[head.n_vocab :] = 0
    partial = torch.empty_like(head.hidden)
    hidden_T = head.hidden.T.contiguous()  # the CPU's bf16 product wants its left operand by rows
    head_values = None
    if slopes is not None:
        q_head = torch.exp(rows.head - rows.log_normalizer[:, None])
        head_values = (q_weight[:, None] * q_head + slopes[0]).reshape(-1)
        if objective.temperature == 1:
            # on the tail both terms are multiples of softmax(z): one exponential serves. A tail of no mass has no slope
            ratio = torch.exp(rows.log_normalizer - rows.log_tail)
            q_weight = q_weight + torch.where(slopes[1] == 0, 0.0, slopes[1] * ratio)
    for index, part, z in head.blocks():
        if slopes is None or objective.temperature == 1:
            _KERNELS["write_gradient"](z, rows.log_normalizer, q_weight)
        else:
            _KERNELS["write_tempered_gradient"](
                z,
                rows.log_normalizer,
                q_weight,
                1 / objective.temperature,
                rows.log_tail,
                slopes[1] / objective.temperature,
            )
        if head_values is not None:
            r, c, places = cached.at(index)
            z[r, c] = head_values[places].to(z.dtype)
        r, c, _ = gold.at(index)
        z[r, c] -= ce_weight
        hidden_gradient += torch.mm(z, head.weight[part], out=partial)
        weight_gradient[part] = torch.mm(hidden_T, z).T
    return hidden_gradient.to(head.hidden.dtype), weight_gradient
