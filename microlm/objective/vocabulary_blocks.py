"""The logits of N tokens as a stream of blocks over the vocabulary, and the passes that read a block while it is hot.

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**22  # of one block of logits: 8 MiB in bfloat16
KEPT_ELEMENTS = 2**28  # logits that are kept from one sweep to the next, where they are no more: 512 MiB in bfloat16
GROUP = 64  # neighbouring ids of which a row keeps the largest logit; a block holds whole groups
LOWEST = -1e30  # below any logit, and finite, so that no difference of infinities arises


def update_statistics(z: Tensor, scale: float, peak: Tensor, total: Tensor) -> None:
    """Online logsumexp of scale * z along rows: exp(peak) * total is the sum so far. In place on `peak` and `total`."""
    scaled = z.to(peak.dtype) * scale
    raised = torch.maximum(peak, scaled.amax(-1))
    total.copy_(total * torch.exp(peak - raised) + torch.exp(scaled - raised[:, None]).sum(-1))
    peak.copy_(raised)


def update_group_statistics(z: Tensor, scale: float, peak: Tensor, total: Tensor, largest: Tensor) -> None:
    """`update_statistics`, and into `largest` [N, groups] the largest of each group of scale * z."""
    scaled = z.to(peak.dtype) * scale
    padded = torch.nn.functional.pad(scaled, (0, -z.shape[1] % GROUP), value=LOWEST)
    largest.copy_(padded.unflatten(1, (-1, GROUP)).amax(-1))
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


EAGER: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (update_statistics, update_group_statistics, write_gradient, write_tempered_gradient)
}
KERNELS = dict(EAGER)
compiling = False


def compile_kernels() -> None:
    """Compile the passes over a block of logits: each becomes one read (and one write) of the block."""
    global compiling
    compiling = True
    KERNELS.update({name: torch.compile(made) for name, made in EAGER.items()})  # evaluation brings other shapes


def kernel(name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A pass by name; one that is not there yet is made, and compiled where the others are."""
    if name not in KERNELS:
        KERNELS[name] = torch.compile(make()) if compiling else make()
    return KERNELS[name]


class Entries:
    """Single entries (row, id) of the [N, V] logits, grouped by the block of the vocabulary that holds them.

    Args:
        ids: int64 [N, k], or [M] where `rows` [M] says whose they are.
    """

    def __init__(self, ids: Tensor, blocks: "VocabularyBlocks", rows: Tensor | None = None) -> None:
        flat = ids.reshape(-1)
        found, order = torch.sort(flat // blocks.block, stable=True)
        edges = torch.arange(0, (blocks.n_vocab + blocks.block - 1) // blocks.block + 1, device=ids.device)
        self._edges = torch.searchsorted(found, edges).tolist()
        self._order = order
        self._rows = order // ids.shape[1] if rows is None else rows[order]
        self._columns = flat[order] % blocks.block

    def at(self, block_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns inside the block, and places in the flattened ids."""
        chosen = slice(self._edges[block_index], self._edges[block_index + 1])
        return self._rows[chosen], self._columns[chosen], self._order[chosen]


class VocabularyBlocks:
    """hidden [N, D] times weight [V, D], block by block.

    Args:
        keep: several sweeps will come. Up to KEPT_ELEMENTS the first one's blocks stay, and the others find them as
            they were left; beyond, each sweep makes them anew.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, n_vocab: int, keep: bool = False) -> None:
        self.hidden, self.n_vocab = hidden, n_vocab
        self.weight = weight[:n_vocab].to(hidden.dtype)
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        fitting = BLOCK_ELEMENTS // max(1, hidden.shape[0]) // 256 * 256
        self.block = max(256, min(fitting, 16384))
        whole = hidden.shape[0] * n_vocab
        self._kept = _kept_memory(hidden, whole) if keep and whole <= KEPT_ELEMENTS else None
        self._made = False

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Index, slice of the vocabulary and logits [N, block]; unless they are kept, the next block reuses the memory.

        A sweep may write into a block: the next one must make do with what it finds there.
        """
        n, made = self.hidden.shape[0], self._made
        memory = self.hidden.new_empty(n * self.block) if self._kept is None else self._kept
        for index, start in enumerate(range(0, self.n_vocab, self.block)):
            part = slice(start, min(start + self.block, self.n_vocab))
            first = 0 if self._kept is None else n * start
            z = memory[first : first + n * (part.stop - start)].view(n, -1)
            yield index, part, z if made else torch.mm(self.hidden, self.weight[part].T, out=z)
        self._made = self._kept is not None

    def filled(self, value: float) -> Tensor:
        """[N] in the precision of sums."""
        return self.hidden.new_full((self.hidden.shape[0],), value, dtype=self.exact)


_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _kept_memory(like: Tensor, elements: int) -> Tensor:
    """Room for kept logits, the same in every call: to be given fresh pages costs a tenth of a training step."""
    place = (like.device, like.dtype)
    if place not in _memory or len(_memory[place]) < elements:
        _memory.pop(place, None)
        _memory[place] = like.new_empty(elements)
    return _memory[place]
