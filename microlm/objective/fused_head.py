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
CUDA a capped one, has a slope of its own for each token: a sweep between the two takes the means (tails.py).

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from microlm.objective.divergences import SparseTeacher
from microlm.objective.schedule import Objective
from microlm.objective.tails import TAILS, DistillationTerm
from microlm.objective.vocabulary_blocks import AnyEntries, Entries, StudentRows, VocabularyBlocks, first_sweep, kernel


class HeadLoss(NamedTuple):
    """`loss` carries the gradient; the other two are sums over the N tokens, in nats."""

    loss: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def token_nats(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
    """Cross-entropy of each token, nats [N], without a gradient. Arguments as `fused_head_loss`."""
    with torch.no_grad():
        student = first_sweep(VocabularyBlocks(hidden, weight, n_vocab), targets)
        return student.log_normalizer - student.gold_logits


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
    if objective.kd_weight == 0 or teacher.covered is None:
        return HeadLoss(*_FusedHead.apply(hidden, weight, targets, n_vocab, objective, teacher, count))
    parts = []  # covered rows and the others, each for themselves: both have all of their loss in one call of the head
    for mask, wanted in ((teacher.covered, objective), (~teacher.covered, Objective(z_loss=objective.z_loss))):
        rows = mask.nonzero()[:, 0]  # once: each selection by a mask would ask how many there are
        if len(rows):
            said = teacher.of(rows) if wanted is objective else None
            parts.append(fused_head_loss(hidden[rows], weight, targets[rows], n_vocab, wanted, said, count))
    return HeadLoss(*map(sum, zip(*parts)))


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, n_vocab, objective, teacher, count):
        wanted = any(ctx.needs_input_grad[:2])
        blocks = VocabularyBlocks(hidden, weight, n_vocab, keep=wanted)
        distilling = objective.kd_weight > 0
        if distilling:
            # with every id cached there is no tail to treat
            tail = "lumped" if teacher.ids.shape[1] == n_vocab else objective.tail
            groups = tail == "capped" and not blocks.layout.whole_passes
            student = first_sweep(blocks, targets, teacher.ids, 1 / objective.temperature, groups)
        else:
            student = first_sweep(blocks, targets)

        nats = student.log_normalizer - student.gold_logits
        ce_weight = objective.ce_weight / count
        loss = ce_weight * nats.sum()
        q_weight = torch.full_like(nats, ce_weight)  # of softmax(z) in the gradient
        if objective.z_loss:
            loss = loss + objective.z_loss / count * student.log_normalizer.square().sum()
            q_weight = q_weight + 2 * objective.z_loss / count * student.log_normalizer
        term, total = None, nats.new_zeros(())
        if distilling:
            term = TAILS[tail](student, teacher, objective, objective.kd_weight / count)
            total = term.total
            loss = loss + objective.kd_weight / count * total
        if wanted:
            ctx.save_for_backward(*_gradients(student, term, q_weight, ce_weight, weight))
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


def _gradients(
    student: StudentRows, term: DistillationTerm | None, q_weight: Tensor, ce_weight: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The second sweep: logits turned into their gradients, and those into gradients of hidden and weight."""
    blocks, hidden = student.blocks, student.blocks.hidden
    hidden_gradient = torch.zeros(hidden.shape, dtype=blocks.exact, device=hidden.device)
    weight_gradient = torch.empty_like(weight)
    weight_gradient[blocks.n_vocab :] = 0
    add = _added_on_cuda if hidden.device.type == "cuda" else _AddedOnCpu(hidden)
    singles = _single_gradients(student, term, q_weight)
    if term is not None and term.tail_slope is not None and student.scale == 1:
        # on the tail both terms are multiples of softmax(z): one exponential serves. A tail of no mass has no slope
        ratio = torch.exp(student.log_normalizer - student.log_tail)
        q_weight = q_weight + torch.where(term.tail_slope == 0, 0.0, term.tail_slope * ratio)
    for part, z in blocks:
        _write_gradient(student, term, q_weight, part, z)
        for entries, values in singles:
            entries.write(part, z, values)
        student.gold.subtract(part, z, ce_weight)
        add(z, hidden, blocks.weight[part], hidden_gradient, weight_gradient[part])
    return hidden_gradient.to(hidden.dtype), weight_gradient


def _single_gradients(
    student: StudentRows, term: DistillationTerm | None, q_weight: Tensor
) -> list[tuple[AnyEntries, Tensor]]:
    """The logits that have a gradient of their own, with it: those of the cached ids, and of capped tokens."""
    if term is None:
        return []
    q_head = torch.exp(student.head - student.log_normalizer[:, None])
    singles = [(student.cached, q_weight[:, None] * q_head + term.head_slope)]
    if term.capped is not None:
        rows, ids, log_q = term.capped
        singles.append((Entries(ids, student.blocks, rows), q_weight[rows] * log_q.exp() + term.capped_slope))
    return singles


def _write_gradient(
    student: StudentRows, term: DistillationTerm | None, q_weight: Tensor, part: slice, z: Tensor
) -> None:
    """Turn a block z into the gradient on it, right for all but the single logits, in place."""
    log_normalizer, scale = student.log_normalizer, student.scale
    if term is not None and term.write_dense is not None:
        term.write_dense(part, z, q_weight)
    elif term is None or scale == 1:
        kernel(write_gradient)(z, log_normalizer, q_weight)
    else:
        tail_slope = term.tail_slope * scale
        kernel(write_tempered_gradient)(z, log_normalizer, q_weight, scale, student.log_tail, tail_slope)


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


class _AddedOnCpu:
    """A block's part of both gradients, products in the dtype of the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self._partial = torch.empty_like(hidden)
        self._hidden_T = hidden.T.contiguous()  # the CPU's bf16 product wants its left operand by rows

    def __call__(self, z: Tensor, _: Tensor, weight: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor) -> None:
        hidden_gradient += torch.mm(z, weight, out=self._partial)
        kernel(copy_transposed)(weight_gradient, torch.mm(self._hidden_T, z))


def copy_transposed(target: Tensor, source: Tensor) -> None:
    """target <- source.T, in the precision of `target`. Eager, PyTorch reads the columns one number at a time."""
    target.copy_(source.T)


def _added_on_cuda(z: Tensor, hidden: Tensor, weight: Tensor, hidden_gradient: Tensor, weight_gradient: Tensor) -> None:
    """The same, with the products' sums left in the gradients' own precision, which cuBLAS gives for nothing."""
    wide = {} if z.dtype == hidden_gradient.dtype else {"out_dtype": hidden_gradient.dtype}
    hidden_gradient += torch.mm(z, weight, **wide)
    torch.mm(z.T, hidden, **wide, out=weight_gradient)
