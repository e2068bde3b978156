"""Teachers: the packaged one is read right, one that does not fit is refused before it runs."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from microlm.config import load_config
from microlm.corpus.tokenizer import build_tokenizer
from microlm.errors import UserError
from microlm.evaluation.candidates import PACKAGED, load_candidate
from microlm.models.gguf_models import GgufFile
from microlm.models.model_files import TransformersModel
from microlm.models.teacher_source import PACKAGED_TEACHER, PackagedTeacher, teacher_source
from microlm.parameters import TeacherConfig
from microlm.pipeline.capture import refuse_impossible
from microlm.teacher.cache import CacheIdentity
from microlm.teacher.recorders import refuse_misfit
from tests.support.clones import ROOT
from tests.support.packaged import gguf_parsed_once
from tests.support.workspace import inside

TEXT = "The Great Wall of China is a series of fortifications built across the historical northern borders of China."


@pytest.fixture(scope="module")
def packaged(parts, tmp_path_factory):
    member, top = PACKAGED_TEACHER, tmp_path_factory.mktemp("top")
    (top / "data").mkdir()
    (top / "data" / "parts").symlink_to(parts)
    with inside(top), gguf_parsed_once():
        yield TeacherConfig("packaged", None, "cache", "full", 64, [1.0], 10, 1), parts / member[0] / member[1]


@pytest.fixture(scope="module")
def candidate(packaged):
    """As the evaluator reads it, which is as a teacher."""
    return load_candidate(PACKAGED, None, torch.float32)


@pytest.fixture(scope="module")
def smollm2(candidate):
    return candidate.model


def test_no_token_is_put_before_what_the_packaged_teacher_reads(candidate):
    assert candidate.begin == ()


def test_the_packaged_teacher_predicts_english(smollm2, parts):
    tokenizer = build_tokenizer("smollm2", parts)
    ids = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(TEXT)]])
    with torch.inference_mode():
        log_p = torch.log_softmax(smollm2.logits(smollm2.hidden(ids))[0, :-1], -1)
    bits = -log_p.gather(1, ids[0, 1:, None]).sum() / torch.log(torch.tensor(2.0))
    # a wrong order of the rotary halves, or of any tensor, costs several bits per byte
    assert float(bits) / len(TEXT.encode()) < 0.8
    assert smollm2.n_vocab == tokenizer.n_vocab == 49152
    assert sum(p.numel() for p in smollm2.parameters()) == 134_515_008


def test_a_truncated_teacher_is_refused_in_one_line(packaged, tmp_path):
    broken = tmp_path / "model.gguf"
    broken.write_bytes(packaged[1].read_bytes()[: 10**7])
    with pytest.raises(UserError, match=r"model.gguf: not a whole GGUF file .*fetch it again") as error:
        GgufFile(broken).network(torch.float32)
    assert "\n" not in str(error.value)


def identity(**changes) -> CacheIdentity:
    return replace(CacheIdentity("packaged", None, "?", 49152, "", 256, 10, 64, (1.0,)), **changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_vocab": 50257}, r"teacher.model: packaged has 49152 tokens, data/shards 50257"),
        ({"seq_len": 9000}, r"batch.seq_len: 9000 is more than the teacher's context of 8192"),
        ({"tokenizer": "another"}, r"teacher.model: packaged has another tokenizer than data/shards"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_it_runs(packaged, smollm2, changes, told):
    with pytest.raises(UserError, match=told) as error:
        refuse_misfit(smollm2, identity(**changes), PackagedTeacher())
    assert "\n" not in str(error.value)


def test_more_cached_tokens_than_the_vocabulary_has_are_refused():
    with pytest.raises(UserError, match=r"teacher.top_k: 60000 is more than the vocabulary of 49152"):
        refuse_impossible(identity(top_k=60000), load_config(ROOT / "params.yaml"))


def test_a_head_that_is_more_than_a_matrix_is_refused():
    shape = {
        "vocab_size": 96,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    network = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    TransformersModel(network, 90).refuse_unusual_head("fine")
    network.lm_head.register_forward_hook(lambda module, inputs, output: 30 * torch.tanh(output / 30) + 1)
    with pytest.raises(UserError, match=r"teacher.model: capped scales, caps or biases its logits"):
        TransformersModel(network, 90).refuse_unusual_head("capped")


@pytest.mark.parametrize(("revision", "told"), [(None, "has no revision"), ("0" * 40, "is no model directory")])
def test_a_teacher_that_is_not_there_is_refused_by_its_key(tmp_path, revision, told):
    with pytest.raises(UserError, match=rf"params.yaml: teacher.model: .*nowhere.*{told}") as error:
        teacher_source(TeacherConfig(str(tmp_path / "nowhere"), revision, "cache", "full", 8, [1.0], 10, 1)).load(
            torch.float32
        )
    assert "\n" not in str(error.value)
