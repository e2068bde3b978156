"""A name that can only be a path is never asked for on the hub; one that is spelled alike is named instead."""

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from microlm.errors import UserError
from microlm.models.model_names import hub_or_cache, is_path, near_folders, refuse_absent_folder


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("student", "control", "continued"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models/studnet", "models/studnet: is no model directory; did you mean models/student?"),
        ("models/studnet/", "did you mean models/student?"),
        ("./models/contineud", "did you mean models/continued?"),
        ("model/student/", "did you mean models/student?"),
        ("../nothing", "name a folder with config.json, or a hub id such as gpt2 (seen from "),
        ("models\\student", "did you mean models/student?"),
        ("~/student", "name a folder"),
        ("a/b/c", "name a folder"),
        ("models/notes.txt", "models/notes.txt: is no model directory; name a folder"),
    ],
)
def test_what_can_only_be_a_path_is_refused_with_the_names_beside_it(name: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        refuse_absent_folder(name, "MODEL: ")
    assert str(error.value).startswith("MODEL: ") and told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2", "packaged", "models", "models/student", "student"])
def test_folders_and_ids_of_the_hub_pass(name: str) -> None:
    refuse_absent_folder(name)


@given(st.from_regex(r"[A-Za-z0-9][\w.-]{0,20}(/[A-Za-z0-9][\w.-]{0,20})?", fullmatch=True))
def test_an_id_of_the_hub_is_no_path_unless_a_folder_has_its_owners_name(name: str) -> None:
    owner, _, rest = name.partition("/")
    assert is_path(name) == ((bool(rest) and Path(owner).is_dir()) or Path(name).exists())


@given(st.text(max_size=30))
def test_any_name_is_answered(name: str) -> None:
    try:
        refuse_absent_folder(name)
    except UserError as error:
        assert "is no model directory" in str(error)
    near_folders(Path("models") / name.replace("\0", ""))


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # the client of a command: a test before this one may have left that of a stage, which tries for minutes
    monkeypatch.setattr("huggingface_hub.get_session", httpx2.Client)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with hub_or_cache():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
