"""The tabled tail: what the teacher says outside the cached ids, taken to have the shape of its average distribution.

A student puts mass where the teacher's tail is, and reverse KL weighs the teacher's log-probabilities there by the
student's. The cache holds the tail's mass at each position; one table of the vocabulary, the same at every position and
so free of bytes per token, holds how that mass is spread:

    p_j = c u_j on the tail,  u_j = mean over positions of p_j,  c so that they sum to p_t

The mean over all positions is the better table: that over positions where j is outside the top k knows less of the
tokens that are frequent somewhere, and these are where a student has its mass. Unlike the lumped and the capped tail
this is an estimate and no bound. `python -m stages.probe` measures its error.
"""

import torch
from torch import Tensor


def scale_to_mass(log_p: Tensor, ids: Tensor, log_table: Tensor) -> Tensor:
    """log c, [...], of the cache's log_p [..., k + 1] and ids [..., k], and the table [V]."""
    table = log_table.double().exp()
    tail = (table.sum() - table[ids].sum(-1)).clamp_min(torch.finfo(torch.float64).tiny)
    return (log_p[..., -1].double() - tail.log()).to(log_p.dtype)


def table_tail(log_p: Tensor, ids: Tensor, log_table: Tensor) -> Tensor:
    """log p over the whole vocabulary, [..., V]: the dense oracle."""
    dense = scale_to_mass(log_p, ids, log_table)[..., None] + log_table.to(log_p.dtype)
    return dense.scatter(-1, ids, log_p[..., :-1])
