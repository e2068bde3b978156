"""The logits of N tokens as a stream of blocks over the vocabulary, and the passes that read a block while it is hot.

Shapes: N tokens, D hidden size, V real vocabulary, k cached ids.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microlm.runtime import compilation

GROUP = 64  # neighbouring ids of which a row keeps the largest logit; a block holds whole groups
LOWEST = -1e30  # below any logit, and finite, so that no difference of infinities arises
COLUMNS = 256  # of which a block's width is a multiple, where it is not the whole vocabulary
SPARE = 8  # columns beside a block on CUDA: they take what belongs elsewhere, and 16 bytes keep rows aligned


@dataclass(frozen=True)
class Sizes:
    """How logits are held on one kind of device.

    Attributes:
        block: elements of one block.
        kept: elements that stay from one sweep to the next, where all of them are no more.
        widest: columns of a block.
        whole_passes: a pass over a whole block costs less than to find out which part of it matters. Then no list of
            tokens is made whose length the host would have to wait for.
    """

    block: int
    kept: int
    widest: int
    whole_passes: bool


SIZES = {
    # a block of 8 MiB in bfloat16 stays in the processor's cache
    "cpu": Sizes(2**22, 2**28, 16384, whole_passes=False),
    # below 2^31, where kernels still count in 32 bits; 65,536 tokens of a vocabulary of 50,304 keep 6.6 GB
    "cuda": Sizes(2**30, 2**32, 2**20, whole_passes=True),
}


@dataclass(frozen=True)
class Layout:
    """Of the logits [N, V] of one call of the head."""

    width: int  # columns of a block; the last one may be narrower
    row: int  # elements from one row of a block to the next, at its widest
    kept: bool

    def elements(self, n_rows: int, n_vocab: int) -> int:
        """Of all logits that exist at once."""
        blocks = -(-n_vocab // self.width) if self.kept else 1
        return n_rows * blocks * self.row if self.row > self.width else n_rows * min(n_vocab, blocks * self.width)


def layout_of(n_rows: int, n_vocab: int, device: str, sweeps: bool = True) -> Layout:
    """For `n_rows` tokens on a kind of device. `sweeps`: several will come, so that keeping is of use."""
    sizes, rows = SIZES.get(device, SIZES["cpu"]), max(1, n_rows)
    kept = sweeps and rows * n_vocab <= sizes.kept
    if not sizes.whole_passes:
        width = max(COLUMNS, min(sizes.block // rows // COLUMNS * COLUMNS, sizes.widest))
        return Layout(width, width, kept)
    blocks = max(1, -(-rows * n_vocab // sizes.block), -(-n_vocab // sizes.widest))
    width = -(-n_vocab // blocks)  # as equal as whole multiples allow
    width = width if blocks == 1 else -(-width // COLUMNS) * COLUMNS
    return Layout(width, -(-width // SPARE) * SPARE + SPARE, kept)


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


def copy_transposed(target: Tensor, source: Tensor) -> None:
    """target <- source.T, in the precision of `target`. Eager, PyTorch reads the columns one number at a time."""
    target.copy_(source.T)


EAGER: dict[str, Callable[..., Any]] = {
    kernel.__name__: kernel
    for kernel in (update_statistics, update_group_statistics, write_gradient, write_tempered_gradient, copy_transposed)
}
_kernels: dict[tuple[str, bool], Callable[..., Any]] = {}


def kernel(name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A pass over a block by name: made once, and compiled to one read (and one write) where this process compiles."""
    key = name, compilation.enabled
    if key not in _kernels:
        _kernels[key] = torch.compile(make()) if compilation.enabled else make()  # evaluation brings other shapes
    return _kernels[key]


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

    def read(self, block_index: int, z: Tensor, into: Tensor) -> None:
        """The entries that lie in a block z, into their places in `into`, flat."""
        r, c, places = self.at(block_index)
        into[places] = z[r, c].to(into.dtype)

    def write(self, block_index: int, z: Tensor, values: Tensor | float) -> None:
        """Into a block z: one number, or each entry's own of `values`, flat."""
        r, c, places = self.at(block_index)
        z[r, c] = values[places].to(z.dtype) if isinstance(values, Tensor) else values

    def subtract(self, block_index: int, z: Tensor, amount: float) -> None:
        """`amount` from every entry in a block z."""
        r, c, _ = self.at(block_index)
        z[r, c] -= amount


class SpilledEntries:
    """`Entries` of [N, k] ids without a list by blocks, whose lengths the host would have to wait for.

    Every pass touches all entries: those of other blocks land in a column beside the block.
    """

    def __init__(self, ids: Tensor, blocks: "VocabularyBlocks") -> None:
        self._ids, self._blocks = ids, blocks

    def _at(self, block_index: int, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block with its spare columns, each entry's column there, and whether it is inside; [N, k] both."""
        columns = self._ids - block_index * self._blocks.block
        inside = (columns >= 0) & (columns < z.shape[1])
        wide = z.as_strided((z.shape[0], z.shape[1] + 1), z.stride())
        return wide, torch.where(inside, columns, z.shape[1]), inside

    def read(self, block_index: int, z: Tensor, into: Tensor) -> None:
        wide, columns, inside = self._at(block_index, z)
        held = into.view(self._ids.shape)
        held.copy_(torch.where(inside, wide.gather(1, columns).to(into.dtype), held))

    def write(self, block_index: int, z: Tensor, values: Tensor | float) -> None:
        wide, columns, _ = self._at(block_index, z)
        wide.scatter_(1, columns, values.view(columns.shape).to(z.dtype) if isinstance(values, Tensor) else values)

    def subtract(self, block_index: int, z: Tensor, amount: float) -> None:
        wide, columns, _ = self._at(block_index, z)
        wide.scatter_(1, columns, wide.gather(1, columns) - amount)


AnyEntries = Entries | SpilledEntries


class VocabularyBlocks:
    """hidden [N, D] times weight [V, D], block by block.

    Args:
        keep: several sweeps will come. Where the logits are few enough the first one's blocks stay, and the others find
            them as they were left; otherwise each sweep makes them anew.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, n_vocab: int, keep: bool = False) -> None:
        self.hidden, self.n_vocab = hidden, n_vocab
        self.weight = weight[:n_vocab].to(hidden.dtype)
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.whole_passes = SIZES.get(hidden.device.type, SIZES["cpu"]).whole_passes
        self.layout = layout_of(hidden.shape[0], n_vocab, hidden.device.type, keep)
        self.block = self.layout.width
        self._kept = _kept_memory(hidden, self.layout.elements(hidden.shape[0], n_vocab)) if self.layout.kept else None
        self._made = False

    def entries(self, ids: Tensor) -> AnyEntries:
        """Of ids [N, k]."""
        return SpilledEntries(ids, self) if self.whole_passes else Entries(ids, self)

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Index, slice of the vocabulary and logits [N, block]; unless they are kept, the next block reuses the memory.

        A sweep may write into a block: the next one must make do with what it finds there.
        """
        n, made, row = self.hidden.shape[0], self._made, self.layout.row
        spilled = row > self.block
        memory = self.hidden.new_empty(n * row) if self._kept is None else self._kept
        for index, start in enumerate(range(0, self.n_vocab, self.block)):
            part = slice(start, min(start + self.block, self.n_vocab))
            width = part.stop - part.start
            first = 0 if self._kept is None else n * (index * row if spilled else start)
            held = memory[first : first + n * (row if spilled else width)].view(n, -1)
            z = held[:, :width] if spilled else held
            yield index, part, z if made else torch.mm(self.hidden, self.weight[part].T, out=z)
        self._made = self._kept is not None

    def filled(self, value: float) -> Tensor:
        """[N] in the precision of sums."""
        return self.hidden.new_full((self.hidden.shape[0],), value, dtype=self.exact)


_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _kept_memory(like: Tensor, elements: int) -> Tensor:
    """Room for kept logits, on the CPU the same in every call: fresh pages would cost a tenth of a training step.

    CUDA's allocator keeps it anyway, and lends it to others meanwhile.
    """
    if like.device.type == "cuda":
        return like.new_empty(elements)
    place = (like.device, like.dtype)
    if place not in _memory or len(_memory[place]) < elements:
        _memory.pop(place, None)
        _memory[place] = like.new_empty(elements)
    return _memory[place]
