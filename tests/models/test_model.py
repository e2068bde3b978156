"""The student against transformers' Qwen3: what is exported is what was trained."""

import pytest
import torch

from microlm.errors import UserError
from microlm.models.architecture import ModelShape
from microlm.models.model_files import WEIGHTS, is_ours, load_student, save_student
from microlm.models.student import StudentLM
from tests.support.packaged import packaged_tokenizer


@pytest.fixture(scope="module")
def tokenizer(parts):
    return packaged_tokenizer("gpt2", parts)


@pytest.fixture(scope="module")
def student(tokenizer) -> StudentLM:
    shape = ModelShape(
        tokenizer.n_vocab,
        50304,
        layers=2,
        hidden_size=32,
        heads=2,
        head_dim=16,
        intermediate_size=48,
        context=64,
        rope_theta=10000.0,
    )
    model = StudentLM(shape, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # away from the initial zeros, so that every matrix and gain counts
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def exported(student, tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "student"
    save_student(student, tokenizer, directory)
    return directory


def test_exported_logits_match_transformers(student, exported):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported).eval()
    tokens = torch.randint(0, student.n_vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            student.logits(student.hidden(tokens)), theirs(tokens).logits[..., : student.n_vocab], rtol=1e-4, atol=1e-4
        )


def test_exported_model_generates_and_its_tokenizer_gives_our_ids(exported, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    text = "In 1969, 3 people flew to the moon — naïve?\n\n  Yes."
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokens = model.generate(**theirs("The moon", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokens.shape[1] > 2


def test_a_student_directory_reads_back_the_same(student, exported):
    loaded = load_student(exported)
    assert loaded.shape == student.shape
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), student.state_dict().values()))
    assert isinstance(loaded, StudentLM) and is_ours(exported)


def test_damaged_weights_are_refused_in_one_line(exported, tmp_path):
    directory = tmp_path / "student"
    directory.mkdir()
    for file in exported.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / WEIGHTS).write_bytes((exported / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors: damaged, ") as error:
        load_student(directory)
    assert "\n" not in str(error.value) and "dvc repro" in str(error.value)


def test_positions_and_mask_let_rows_share_a_context(student):
    """[a b c | d] and [a b c | e] in one row, with restarted positions, score as two rows do."""
    a = torch.tensor([[5, 6, 7, 8]])
    b = torch.tensor([[5, 6, 7, 9]])
    packed = torch.tensor([[5, 6, 7, 8, 9]])
    positions = torch.tensor([[0, 1, 2, 3, 3]])
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[4, 3] = False
    with torch.no_grad():
        together = student.hidden(packed, positions, mask[None, None])
        torch.testing.assert_close(together[0, 3], student.hidden(a)[0, 3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together[0, 4], student.hidden(b)[0, 3], rtol=1e-5, atol=1e-5)


def test_a_later_token_changes_nothing_before_it(student):
    tokens = torch.randint(0, student.n_vocab, (1, 12), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % student.n_vocab
    with torch.no_grad():
        before, after = student.hidden(tokens), student.hidden(changed)
    assert torch.equal(before[0, :8], after[0, :8]) and not torch.equal(before[0, 8:], after[0, 8:])


def test_the_same_seed_gives_the_same_weights(student):
    assert all(
        torch.equal(a, b)
        for a, b in zip(StudentLM(student.shape, 4).parameters(), StudentLM(student.shape, 4).parameters())
    )
    assert not torch.equal(StudentLM(student.shape, 4).head_weight, StudentLM(student.shape, 5).head_weight)


def test_the_headline_shape_has_the_parameters_of_the_design():
    shape = ModelShape(
        50280,
        50304,
        layers=12,
        hidden_size=768,
        heads=6,
        head_dim=128,
        intermediate_size=2048,
        context=1024,
        rope_theta=10000.0,
    )
    with torch.device("meta"):
        layers = StudentLM(ModelShape(**{**shape.__dict__, "context": 2}))
    assert layers.parameter_count() == 123_590_400
