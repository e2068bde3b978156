"""What every language model is to the rest of MicroLM: hidden states first, logits only where they are needed."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]
"""Of one layer, each [B, H, T, E]."""


@dataclass(frozen=True)
class Prefix:
    """What a model keeps of tokens that many rows go on from: keys and values, by reading and then by layer.

    Each reading's tensors [R, H, n, E] stay as they were read. Rows share them: of B rows, each R-th part goes on from
    its own row, and a layer joins them for its own attention only.
    """

    spans: tuple[tuple[KeysValues, ...], ...]
    last: Tensor  # [R, D], hidden states after the last norm of the last token read

    @property
    def length(self) -> int:
        """P, the tokens read."""
        return sum(span[0][0].shape[2] for span in self.spans)

    def layer(self, index: int, rows: int) -> KeysValues:
        """Keys and values of layer `index` for `rows` rows, each [rows, H, P, E]."""
        keys, values = zip(*(span[index] for span in self.spans))
        return _joined(keys, rows), _joined(values, rows)


def _joined(spans: tuple[Tensor, ...], rows: int) -> Tensor:
    repeated = [
        span.repeat_interleave(rows // len(span), dim=0) if 1 < len(span) < rows else span.expand(rows, -1, -1, -1)
        for span in spans
    ]
    return repeated[0] if len(repeated) == 1 else torch.cat(repeated, dim=2)


class LanguageModel(nn.Module):
    """A causal transformer. B rows, T tokens, D hidden width, V size of the real vocabulary.

    The two halves are apart because the head is the dearest part of a small model: a caller runs it only on the
    positions whose predictions it reads.
    """

    n_vocab: int  # V: ids the tokenizer has, without the padding rows of the embedding
    context: int  # positions the model was built for; a row may be longer as long as its positions are below it
    plain_head: bool  # logits are the first V rows of head_weight times the hidden state, and nothing more
    head_weight: Tensor  # [at least V, D]

    def forward(self, tokens: Tensor) -> Tensor:
        """`hidden`, as DistributedDataParallel asks for it."""
        return self.hidden(tokens)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """tokens [B, T] int64, positions [B, T] int64 (None: 0..T-1), mask [B, 1, T, T] bool, True where the query
        (dim 2) may attend the key (dim 3) (None: causal) -> hidden states after the last norm [B, T, D].

        After a prefix of P tokens the mask is [B, 1, T, P + T], and positions count on (None: P..P+T-1).
        """
        raise NotImplementedError

    def read_prefix(self, tokens: Tensor, prefix: Prefix | None = None) -> Prefix:
        """What rows need to go on after tokens [P], or each part of the rows after its own row of tokens [R, P].

        After `prefix`, if there is one: its tokens count as read before.
        """
        raise NotImplementedError

    def extend(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """tokens [B, T] that follow those in `cache` (None: none) -> hidden states [B, T, D], the longer cache."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V], padding rows of the embedding sliced off."""
        raise NotImplementedError
