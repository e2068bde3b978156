"""A student's embedding out of its teacher's (GUIDE, arXiv:2510.06502): its principal directions."""

import torch
from torch import Tensor


def principal_embedding(embedding: Tensor, size: int) -> tuple[Tensor, float]:
    """Coordinates of each row along the `size` directions that hold most of the rows' squared length.

    Inner products of rows, which a tied head and attention live on, are kept as well as any `size` dimensions can
    (Eckart and Young 1936). The mean is not taken out: it is part of every logit. Signs are fixed by each direction's
    largest entry, so that the result does not depend on the library's choice.

    Args:
        embedding: float [V, D].
        size: d, at most D.

    Returns:
        float32 [V, d], and the share of the squared length that it holds.
    """
    rows = embedding.double()
    lengths, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    chosen = directions[:, -size:].flip(-1)
    chosen = chosen * chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()
    return (rows @ chosen).float(), float(lengths[-size:].sum() / lengths.sum())
