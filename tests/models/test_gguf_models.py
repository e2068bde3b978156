"""GGUF files: what was written of a model of transformers' is that model again."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from microlm.corpus.metaspace_format import CONTROL, NORMAL, SPACE
from microlm.errors import UserError
from microlm.models.gguf_models import GgufFile
from microlm.models.transformers_model import TransformersModel

ROWS, LAYERS = 320, 7  # of Gemma's layers the sixth sees the whole context, the others a window
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "tie_word_embeddings": True,
}
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
PIECES = ("<unk>", "<s>", "</s>", *BYTES, "a", "b", SPACE, "ab", f"{SPACE}ab")
KINDS = [CONTROL] * 3 + [6] * 256 + [NORMAL] * 5
IDS = torch.tensor([[1, 259, 260, 261, 262, 263, 5, 9, 300, 17, 259, 2, 40, 41, 42, 43]])


def gemma3() -> PreTrainedModel:
    torch.manual_seed(0)
    thetas = {"sliding_attention": 10_000.0, "full_attention": 300.0}
    config = Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        rope_parameters={kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    )
    return _with_norms(Gemma3ForCausalLM(config))


def llama() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    return _with_norms(LlamaForCausalLM(config))


def _with_norms(network: PreTrainedModel) -> PreTrainedModel:
    for name, parameter in network.named_parameters():
        if name.endswith("norm.weight"):  # all alike as they are made
            parameter.data += 0.5 * torch.rand_like(parameter)
    return network.eval()


def write(path: Path, network: PreTrainedModel, architecture: str, kind: gguf.GGMLQuantizationType) -> None:
    """As llama.cpp's converter does."""
    config, writer = network.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(300.0)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(PIECES))
    writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    writer.add_token_types(KINDS)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(architecture == "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values = tensor + 1
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        values, stored = np.ascontiguousarray(values.numpy()), names.get_name(name, try_suffixes=(".weight",))
        quantized = values.ndim > 1 and kind != gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, kind) if quantized else values,
                          raw_dtype=kind if quantized else None)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("architecture", "make"), [("gemma3", gemma3), ("llama", llama)])
def test_a_written_model_has_its_logits_back(architecture, make, tmp_path):
    network, path = make(), tmp_path / "model.gguf"
    write(path, network, architecture, gguf.GGMLQuantizationType.F32)
    read = GgufFile(path).network(torch.float32).eval()
    with torch.inference_mode():
        theirs, ours = network(IDS).logits, read(IDS).logits
        # what is tested tells the things apart that could be wrong
        assert (theirs - network(IDS.flip(1)).logits).abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert type(read) is type(network)
    for key in ("layer_types", "sliding_window", "head_dim", "hidden_activation", "query_pre_attn_scalar"):
        assert getattr(read.config, key, None) == getattr(network.config, key, None)
    TransformersModel(read, ROWS).refuse_unusual_head("fine")


def test_blocks_of_few_bits_are_as_gguf_reads_them(tmp_path):
    network, path = gemma3(), tmp_path / "model.gguf"
    write(path, network, "gemma3", gguf.GGMLQuantizationType.Q8_0)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.3.ffn_down.weight"]
    read = GgufFile(path).network(torch.float32).state_dict()["model.layers.3.mlp.down_proj.weight"]
    assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
    np.testing.assert_array_equal(read.numpy(), gguf.dequantize(stored.data, stored.tensor_type))
    original = network.state_dict()["model.layers.3.mlp.down_proj.weight"]
    torch.testing.assert_close(read, original, rtol=0, atol=0.02)


def test_its_tokenizer_is_its_scores(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, gemma3(), "gemma3", gguf.GGMLQuantizationType.F32)
    tokenizer = GgufFile(path).metaspace_tokenizer("tiny")
    assert tokenizer.encode_as_it_is("ab abé").tolist() == [262, 263, 3 + 0xC3, 3 + 0xA9]
    assert (tokenizer.begin, tokenizer.eot_id, tokenizer.n_vocab) == ((1,), 2, len(PIECES))


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, llama(), "llama", gguf.GGMLQuantizationType.F32)
    with pytest.raises(UserError, match=r"model.gguf: its tokenizer is no SentencePiece BPE without a space") as error:
        GgufFile(path).metaspace_tokenizer("tiny")
    assert "\n" not in str(error.value)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match=r"other.gguf: holds 'mamba', not one of the architectures llama, gemma3"):
        GgufFile(tmp_path / "other.gguf").network(torch.float32)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.gguf: not a whole GGUF file .*fetch it again"):
        GgufFile(path).network(torch.float32)
    with pytest.raises(UserError, match=r"nowhere.gguf: not a whole GGUF file"):
        GgufFile(tmp_path / "nowhere.gguf")
