"""A transformers causal language model behind the project's interface (see interface.py)."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microlm.errors import UserError
from microlm.models.interface import KeysValues, LanguageModel, Prefix

if TYPE_CHECKING:
    from transformers import Cache

UNSTATED_CONTEXT = 2048  # a model of relative positions may not say; those published so were trained on it
CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len", "seq_length")


class TransformersModel(LanguageModel):
    """Any transformers causal language model. Its head may have a bias, a scale or a soft cap beside its matrix."""

    def __init__(self, network: nn.Module, n_vocab: int) -> None:
        super().__init__()
        self.network = network
        self.n_vocab = n_vocab

    @property
    def context(self) -> int:
        stated = (getattr(self._config, key, None) for key in CONTEXT_KEYS)
        return next((limit for limit in stated if limit), UNSTATED_CONTEXT)

    @property
    def uniform_context(self) -> int:
        """Rows of at most this many tokens are attended whole and rotated alike.

        Beyond it a sliding window or a chunk cuts what some layer sees, or LongRoPE takes other frequencies, and a mask
        or a prefix from outside would change the result.
        """
        limits = [self.context, getattr(self._config, "attention_chunk_size", None)]
        if getattr(self._config, "use_sliding_window", True):
            limits.append(getattr(self._config, "sliding_window", None))
        rope = getattr(self._config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings"))
        return min(limit for limit in limits if limit)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, prefix: Prefix | None = None
    ) -> Tensor:
        """As `LanguageModel.hidden`. ValueError or TypeError where the network takes no positions or no such mask."""
        cache = None if prefix is None else _prefix_cache(prefix, len(prefix.spans[0]), keep=False)
        return self._run(tokens, positions, mask, cache).last_hidden_state

    def read_prefix(self, tokens: Tensor, prefix: Prefix | None = None) -> Prefix:
        """As `LanguageModel.read_prefix`. ValueError or TypeError where the network keeps something else."""
        cache = _prefix_cache(prefix, self._config.num_hidden_layers, keep=True)
        hidden = self._run(torch.atleast_2d(tokens), cache=cache).last_hidden_state
        spans = () if prefix is None else prefix.spans
        return Prefix((*spans, tuple(layer.fresh for layer in cache.layers)), hidden[:, -1])

    def extend(self, tokens: Tensor, cache: "Cache | None" = None) -> tuple[Tensor, "Cache"]:
        """As `LanguageModel.extend`."""
        output = self.network.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.last_hidden_state, output.past_key_values

    def _run(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: "Cache | None" = None
    ) -> Any:
        if mask is not None and "local" in getattr(self._config, "attention_layers", ()):
            raise ValueError("GPT-Neo's local layers count their window along the row, whatever the positions are")
        if mask is not None and self._config._attn_implementation == "eager":
            dtype = self.network.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        # not every network has a parameter for each: name those that are needed
        given = {"position_ids": positions, "attention_mask": mask, "past_key_values": cache}
        given = {name: value for name, value in given.items() if value is not None}
        return self.network.base_model(input_ids=tokens, use_cache=cache is not None, **given)

    @property
    def head_weight(self) -> Tensor:
        """[padded vocabulary, D]."""
        return self.network.get_output_embeddings().weight

    @property
    def plain_head(self) -> bool:
        bias, scale, cap = self._beside_weight
        return bias is None and scale == 1 and cap is None

    @property
    def _config(self) -> Any:
        return self.network.config.get_text_config()

    @property
    def _beside_weight(self) -> tuple[Tensor | None, float, float | None]:
        """The head's bias, its scale (Cohere multiplies, Granite divides) and its cap."""
        names = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        multiplied, divided, cap = (getattr(self._config, name, None) for name in names)
        bias = getattr(self.network.get_output_embeddings(), "bias", None)
        return bias, (multiplied or 1.0) / (divided or 1.0), cap

    def logits(self, hidden: Tensor) -> Tensor:
        bias, scale, cap = self._beside_weight
        logits = F.linear(hidden, self.head_weight[: self.n_vocab], None if bias is None else bias[: self.n_vocab])
        if scale != 1:
            logits = logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def refuse_foreign_logits(self, name: str) -> "TransformersModel":
        """UserError where the network's own logits are not those of `logits`: a head of a kind we do not know."""
        if not self._has_logits(self.logits):
            raise UserError(
                f"{name}: its logits are not what its output matrix, bias, scale and cap give, so it cannot be scored; "
                "choose another model"
            )
        return self

    def refuse_unusual_head(self, name: str) -> "TransformersModel":
        """UserError where the network's logits are not its head's weight times the hidden state (a bias, a cap)."""
        if not self._has_logits(lambda hidden: F.linear(hidden, self.head_weight[: self.n_vocab])):
            raise UserError(
                f"params.yaml: teacher.model: {name} scales, caps or biases its logits, which is not supported; choose "
                "another teacher"
            )
        return self

    def _has_logits(self, head: Any) -> bool:
        tokens = torch.arange(4, device=self.head_weight.device).unsqueeze(0)
        with torch.inference_mode():
            theirs = self.network(tokens, use_cache=False).logits[..., : self.n_vocab].float()
            ours = head(self.hidden(tokens)).float()
        close = 1e-3 if self.head_weight.dtype == torch.float32 else 2e-2
        return torch.allclose(theirs, ours, rtol=close, atol=close)


def _prefix_cache(prefix: Prefix | None, layers: int, keep: bool) -> "Cache":
    """A transformers cache that puts `prefix` before what a layer brings; to `keep` that too, it becomes `fresh`."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PrefixLayer(DynamicLayer):
        fresh: KeysValues | None = None

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> KeysValues:
            if keep:
                self.fresh = (keys, values)
            if prefix is None:
                return keys, values
            before = prefix.layer(self.index, len(keys))
            return torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2)

        def get_seq_length(self) -> int:
            return 0 if prefix is None else prefix.length

    return Cache(layers=[PrefixLayer(index) for index in range(layers)])
