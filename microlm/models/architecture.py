"""Shapes of the llama family, and the config.json of each: what a student is, whoever trained it first.

The members differ in where they norm and what has a bias; names of tensors and arithmetic are otherwise the same.
"""

from dataclasses import dataclass
from typing import Any, Literal

from microlm.errors import UserError


@dataclass(frozen=True)
class Family:
    """One member: the class that transformers has for it, and what sets it apart.

    Attributes:
        qk_norm: RMSNorm of queries and keys before the rotation: none, of each head, or of all heads at once.
        post_norm: a block norms what attention and MLP return, not what they are given.
        always_biased: queries, keys and values have a bias whatever config.json says.
    """

    architecture: str
    qk_norm: Literal["none", "head", "whole"] = "none"
    post_norm: bool = False
    always_biased: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", always_biased=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm="head"),
    "olmo2": Family("Olmo2ForCausalLM", qk_norm="whole", post_norm=True),
}


COUNTS = {  # of a `ModelShape`, and what config.json calls them
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's slower rotation of long wavelengths (transformers' rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """All that fixes the parameters' shapes. `padded_vocab` rows exist; only `n_vocab` of them are tokens.

    `kv_heads` heads of keys and values serve `heads` of queries in groups; 0 stands for as many as there are queries.
    """

    n_vocab: int
    padded_vocab: int
    layers: int
    hidden_size: int
    heads: int
    head_dim: int
    intermediate_size: int
    context: int
    rope_theta: float
    norm_eps: float = 1e-6
    kv_heads: int = 0
    family: str = "qwen3"
    tied: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family]

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def block_matrix_count(self) -> int:
        """Parameters of the blocks' matrices, those that Muon moves."""
        attention = 2 * (self.query_width + self.key_width)
        return self.layers * (attention + 3 * self.intermediate_size) * self.hidden_size


MEND = "choose another teacher, or start: fresh"


def shape_of(config: dict[str, Any], n_vocab: int, context: int, name: str, mend: str = MEND) -> ModelShape:
    """The shape that a config.json of the family describes.

    Args:
        n_vocab: ids that the tokenizer has.
        context: positions up to which every layer sees all that is before it.
        name: whose config it is, for the refusal.
        mend: how a refusal ends.

    Raises:
        UserError: it is of another family, or has what the family's arithmetic here leaves out.
        KeyError: an entry is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{name}: is of architecture {family!r}, and only {', '.join(FAMILIES)} can be had; {mend}")
    rope = config["rope_parameters"]
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(**{key: rope[key] for key in RopeScaling.__dataclass_fields__})
    elif rope["rope_type"] != "default":
        _refuse(name, f"rope_type {rope['rope_type']!r}", mend)
    if rope.get("partial_rotary_factor", 1.0) != 1:
        _refuse(name, "a partial rotation", mend)
    if config["hidden_act"] != "silu":
        _refuse(name, f"hidden_act {config['hidden_act']!r}", mend)
    return ModelShape(
        n_vocab=n_vocab,
        padded_vocab=config["vocab_size"],
        **{count: config[key] for count, key in COUNTS.items()},
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        context=context,
        rope_theta=rope["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        family=family,
        tied=config["tie_word_embeddings"],
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        rope_scaling=scaling,
    )


def _refuse(name: str, what: str, mend: str) -> None:
    raise UserError(f"{name}: has {what}, which a student here cannot have; {mend}")


def config_of(shape: ModelShape, eot_id: int) -> dict[str, Any]:
    """The config.json that transformers reads a model of this shape by."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **vars(shape.rope_scaling)}
    return {
        "architectures": [shape.kind.architecture],
        "model_type": shape.family,
        "vocab_size": shape.padded_vocab,
        "microlm_n_vocab": shape.n_vocab,  # the rest of the rows are padding
        **{key: getattr(shape, count) for count, key in COUNTS.items()},
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rope_parameters": rope,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": shape.attention_bias,
        "mlp_bias": shape.mlp_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": shape.tied,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
    }
