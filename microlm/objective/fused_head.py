"""The LM head and the loss in one, block by block over the vocabulary, the gradient in the same call.

A block of logits is made and read while it is in the processor's cache; on CUDA blocks are as large as its kernels
count, so that products run at full rate and launches are few (vocabulary_blocks.py). Two sweeps: the first gathers each
row's normalizer, gold logit and logits of the cached ids; the second turns the logits into gradients. In between, the
logits of a small step are kept, in one array and one precision; those of a large one are dropped and made again: then
[tokens, vocabulary] never exists whole (compare Wijmans et al. 2024, "Cut your losses in large-vocabulary language
models", arXiv:2411.09009, for cross-entropy alone). Both ways give the same bits.

A lumped divergence sees a row through k + 1 numbers: the logits of the cached ids and the tail's logsumexp. Autograd
differentiates it there, on [N, k + 1]; its gradient on a tail token j is that on the tail's logsumexp times
softmax_tail(j). A capped tail adds slopes on the few tokens that the cap binds (capped_tail.py). A tabled tail, and on
CUDA a capped one, has a slope of its own for each token (dense_tail.py): a sweep between the two takes the means.

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microlm.objective.definition import Objective, SparseTeacher
from microlm.objective.tails import TAILS, DistillationTerm, RowStatistics
from microlm.objective.vocabulary_blocks import EAGER, GROUP, LOWEST, AnyEntries, Entries, VocabularyBlocks, kernel


@dataclass(frozen=True)
class HeadLoss:
    """`loss` carries the gradient; the other two are sums over the N tokens, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Cross-entropy of each token, nats [N], without a gradient. Arguments as `fused_head_loss`."""
    with torch.no_grad():
        blocks = VocabularyBlocks(hidden, weight, n_vocab)
        rows = _first_sweep(blocks, blocks.entries(targets[:, None]))
        return rows.log_normalizer - rows.gold


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
        objective: kd_weight = 0 needs no teacher and is plain cross-entropy, bit for bit.
        teacher: the cache's records of these positions; needed where kd_weight > 0. A position that it does not cover
            has cross-entropy alone, with weight 1 whatever the objective's weights, and no divergence.
        count: tokens of the whole step, where these N are one of its parts.
    """
    if objective.kd_weight > 0 and teacher is None:
        raise ValueError("kd_weight > 0 needs a teacher")
    if objective.kd_weight > 0 and teacher.covered is not None:
        return _partly_covered(hidden, weight, targets, n_vocab, objective, teacher, count)
    loss, cross_entropy, divergence = _FusedHead.apply(hidden, weight, targets, n_vocab, objective, teacher, count)
    return HeadLoss(loss, cross_entropy, divergence)


def _partly_covered(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    n_vocab: int,
    objective: Objective,
    teacher: SparseTeacher,
    count: int,
) -> HeadLoss:
    """Covered rows and the others, each for themselves: both have all of their loss in one call of the head."""
    parts, alone = [], Objective(z_loss=objective.z_loss)
    for mask, wanted in ((teacher.covered, objective), (~teacher.covered, alone)):
        rows = mask.nonzero()[:, 0]  # once: each selection by a mask would ask how many there are
        if len(rows):
            said = teacher.of(rows) if wanted is objective else None
            parts.append(fused_head_loss(hidden[rows], weight, targets[rows], n_vocab, wanted, said, count))
    return HeadLoss(*(sum(getattr(part, name) for part in parts) for name in ("loss", "cross_entropy", "divergence")))


def _pass(name: str) -> Callable[..., None]:
    return kernel(name, lambda: EAGER[name])


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n_vocab, objective, teacher, count):
        wanted = any(ctx.needs_input_grad[:2])
        blocks = VocabularyBlocks(hidden, weight, n_vocab, keep=wanted)
        gold = blocks.entries(targets[:, None])
        distilling = objective.kd_weight > 0
        cached = blocks.entries(teacher.ids) if distilling else None
        width = teacher.ids.shape[1] if distilling else 0
        tail = "lumped" if width == n_vocab else objective.tail  # with every id cached there is no tail to treat
        groups = tail == "capped" and not blocks.whole_passes
        rows = _first_sweep(blocks, gold, cached, width, objective.temperature, groups)

        nats = rows.log_normalizer - rows.gold
        ce_weight = objective.ce_weight / count
        loss = ce_weight * nats.sum()
        q_weight = torch.full_like(nats, ce_weight)  # of softmax(z) in the gradient
        if objective.z_loss:
            loss = loss + objective.z_loss / count * rows.log_normalizer.square().sum()
            q_weight = q_weight + 2 * objective.z_loss / count * rows.log_normalizer
        term, total = None, nats.new_zeros(())
        if distilling:
            term = TAILS[tail](blocks, rows, teacher, cached, objective, objective.kd_weight / count)
            total = term.total
            loss = loss + objective.kd_weight / count * total
        if wanted:
            sweep = _GradientSweep(blocks, rows, q_weight, term, cached, objective.temperature)
            ctx.save_for_backward(*_gradients(sweep, gold, ce_weight, weight))
        ctx.mark_non_differentiable(total)
        return loss, nats.sum(), total

    @staticmethod
    def backward(ctx, loss_slope, *_):
        if loss_slope.device.type == "cuda":  # to look at it would wait for all that was launched
            gradients = tuple(g * loss_slope.to(g.dtype) for g in ctx.saved_tensors)
        else:
            scale = loss_slope.item()
            gradients = tuple(g if scale == 1 else g * scale for g in ctx.saved_tensors)
        return *gradients, None, None, None, None, None


def _first_sweep(
    blocks: VocabularyBlocks,
    gold: AnyEntries,
    head: AnyEntries | None = None,
    width: int = 0,
    temperature: float = 1.0,
    groups: bool = False,
) -> RowStatistics:
    peak, total = blocks.filled(LOWEST), blocks.filled(0)
    gold_logits = blocks.filled(0)
    head_logits = torch.empty(len(gold_logits) * width, dtype=blocks.exact, device=gold_logits.device)
    scale = 1.0 if head is None else 1.0 / temperature
    tempered = scale != 1
    tail_peak, tail_total = (blocks.filled(LOWEST), blocks.filled(0)) if tempered else (peak, total)
    n_groups = -(-blocks.n_vocab // GROUP) if groups else 0
    largest = peak.new_empty(len(peak), n_groups)
    for index, part, z in blocks:
        gold.read(index, z, gold_logits)
        if head is not None:
            head.read(index, z, head_logits)
            head.write(index, z, -torch.inf)  # what is left of the row is the tail
        if tempered:
            _pass("update_statistics")(z, 1.0, peak, total)
        if groups:
            held = largest[:, part.start // GROUP : -(-part.stop // GROUP)]
            _pass("update_group_statistics")(z, scale, tail_peak, tail_total, held)
        else:
            _pass("update_statistics")(z, scale, tail_peak, tail_total)
    log_normalizer, log_tail = peak + total.log(), tail_peak + tail_total.log()
    if head is None:
        return RowStatistics(log_normalizer, gold_logits)
    head_logits = head_logits.view(-1, width)
    log_normalizer = torch.logaddexp(log_normalizer, head_logits.logsumexp(-1))
    return RowStatistics(log_normalizer, gold_logits, head_logits, log_tail, largest if groups else None)


class _GradientSweep:
    """Turns logits into the gradient on them, tail tokens by a pass over the block, single ones one by one."""

    def __init__(
        self,
        blocks: VocabularyBlocks,
        rows: RowStatistics,
        q_weight: Tensor,
        term: DistillationTerm | None,
        cached: AnyEntries | None,
        temperature: float,
    ) -> None:
        self.blocks, self._rows, self._term, self._weight, self._scale = blocks, rows, term, q_weight, 1 / temperature
        self._singles: list[tuple[AnyEntries, Tensor]] = []  # with the gradient on each
        if term is None:
            return
        q_head = torch.exp(rows.head - rows.log_normalizer[:, None])
        self._singles.append((cached, (q_weight[:, None] * q_head + term.head_slope).reshape(-1)))
        if term.single is not None:
            single = term.single
            values = q_weight[single.rows] * single.log_q.exp() + single.slope
            self._singles.append((Entries(single.ids, blocks, single.rows), values))
        if term.tail_slope is not None and self._scale == 1:
            # on the tail both terms are multiples of softmax(z): one exponential serves. A tail of no mass has no slope
            ratio = torch.exp(rows.log_normalizer - rows.log_tail)
            self._weight = q_weight + torch.where(term.tail_slope == 0, 0.0, term.tail_slope * ratio)

    def write(self, index: int, part: slice, z: Tensor) -> None:
        rows, term, scale = self._rows, self._term, self._scale
        if term is not None and term.dense is not None:
            term.dense.write(z, part, rows.log_normalizer, self._weight, scale)
        elif term is None or scale == 1:
            _pass("write_gradient")(z, rows.log_normalizer, self._weight)
        else:
            _pass("write_tempered_gradient")(
                z, rows.log_normalizer, self._weight, scale, rows.log_tail, term.tail_slope * scale
            )
        for entries, values in self._singles:
            entries.write(index, z, values)


def _gradients(sweep: _GradientSweep, gold: AnyEntries, ce_weight: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The second sweep: logits turned into their gradients, and those into gradients of hidden and weight."""
    blocks = sweep.blocks
    hidden_gradient = torch.zeros(blocks.hidden.shape, dtype=blocks.exact, device=blocks.hidden.device)
    weight_gradient = torch.empty_like(weight)
    weight_gradient[blocks.n_vocab :] = 0
    add = _added_on_cuda if blocks.hidden.device.type == "cuda" else _AddedOnCpu(blocks.hidden)
    for index, part, z in blocks:
        sweep.write(index, part, z)
        gold.subtract(index, z, ce_weight)
        add(z, blocks.hidden, blocks.weight[part], hidden_gradient, weight_gradient[part])
    return hidden_gradient.to(blocks.hidden.dtype), weight_gradient


class _AddedOnCpu:
    """A block's part of both gradients, products in the dtype of the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self._partial = torch.empty_like(hidden)
        self._hidden_T = hidden.T.contiguous()  # the CPU's bf16 product wants its left operand by rows

    def __call__(self, z: Tensor, _: Tensor, weight: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor) -> None:
        hidden_gradient += torch.mm(z, weight, out=self._partial)
        _pass("copy_transposed")(weight_gradient, torch.mm(self._hidden_T, z))


def _added_on_cuda(z: Tensor, hidden: Tensor, weight: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor) -> None:
    """The same, with the products' sums left in the gradients' own precision, which cuBLAS gives for nothing."""
    wide = {} if z.dtype == hidden_gradient.dtype else {"out_dtype": hidden_gradient.dtype}
    hidden_gradient += torch.mm(z, weight, **wide)
    torch.mm(z.T, hidden, **wide, out=weight_gradient)
