"""The promises of docs/security.md that no other file holds."""

import ast
import contextlib
import os
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from microlm.corpus.parts import PARTS, extract
from microlm.errors import UserError, plain, run_stage
from microlm.evaluation.tasks.data import REVISIONS
from microlm.runtime.terminal import banner
from tests.support.clones import ROOT
from tests.support.tiny_run import tiny_parameters

CODE = sorted(path for folder in ("microlm", "stages", "bench") for path in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TOKEN = "hf_" + "q" * 30


def dangers(source: str) -> Iterator[str]:
    """What in a module could run code or leave a folder that a file from elsewhere names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in PICKLES)
        if isinstance(node, ast.Call):
            yield from _call(ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node)


def _call(name: str, options: dict[str | None, str], node: ast.Call) -> Iterator[str]:
    last = name.rpartition(".")[2]
    required = {
        "torch.load": ("weights_only", "True"),
        "np.load": ("allow_pickle", "False"),
        "YAML": ("typ", "'safe'"),
        "AutoModelForCausalLM.from_pretrained": ("use_safetensors", "True"),
    }
    if name in required and options.get(required[name][0]) != required[name][1]:
        yield f"{name} without {required[name][0]}={required[name][1]}"
    if last in ("from_pretrained", "hf_hub_download", "snapshot_download") and not {"revision", None} & set(options):
        yield f"{name} without a revision"
    if last == "load_dataset" and not {"revision", "data_files"} & set(options):
        yield f"{name} without a revision"
    if options.get("trust_remote_code", "False") != "False":
        yield f"{name} with trust_remote_code"
    if options.get("shell", "False") != "False":
        yield f"{name} with shell"
    if name in ("eval", "exec", "os.system", "torch.save", "yaml.load"):
        yield name
    if last in ("extractall", "unpack_archive", "read_pickle", "to_pickle"):
        yield name


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_runs_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained(name, revision=r)",
        "AutoTokenizer.from_pretrained(name)",
        "load_dataset(name, revision=r, trust_remote_code=True)",
        "datasets.load_dataset(name)",
        "YAML()",
        "yaml.load(text)",
        "archive.extractall(target)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "pd.read_pickle(path)",
    ],
)
def test_each_danger_would_be_found(source: str) -> None:
    assert len(list(dangers(source))) == 1


KINDS = {
    "link": stat.S_IFLNK,
    "pipe": stat.S_IFIFO,
    "device": stat.S_IFCHR,
    "disk": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_archive_with_anything_but_files_is_refused(kind: int, tmp_path: Path) -> None:
    entry = zipfile.ZipInfo("data/odd")
    entry.create_system, entry.external_attr = 3, (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "bad.whl", "w") as archive:
        archive.writestr("data/good", "")
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(UserError, match="could leave the target folder"):
        extract(tmp_path / "bad.whl", ["data/good"], tmp_path / "target")
    assert not (tmp_path / "target").exists()


names = st.lists(st.sampled_from(["..", ".", "", "a", "b", "C:", "\\", "~", "\x1b[2J"]), min_size=1, max_size=5)


@settings(max_examples=60)
@given(name=names.map("/".join), kind=st.sampled_from([0, stat.S_IFREG, *KINDS.values()]))
def test_no_name_in_an_archive_reaches_outside_the_target(
    tmp_path_factory: pytest.TempPathFactory, name: str, kind: int
) -> None:
    top = tmp_path_factory.mktemp("archive")
    entry = zipfile.ZipInfo(name or "x")
    entry.external_attr = (kind | 0o644) << 16
    with zipfile.ZipFile(top / "bad.whl", "w") as archive:
        archive.writestr(entry, "content")
    with contextlib.suppress(UserError):
        extract(top / "bad.whl", [archive.namelist()[0]], top / "in" / "target")
    outside = [path for path in top.rglob("*") if path.is_file() and not path.is_relative_to(top / "in" / "target")]
    assert outside == [top / "bad.whl"]
    assert not any(path.is_symlink() for path in top.rglob("*"))


def test_all_that_is_fetched_is_pinned() -> None:
    params = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    commit = re.compile(r"[0-9a-f]{40}")
    assert all(commit.fullmatch(revision) for revision in REVISIONS.values())
    assert all(re.fullmatch(r"[0-9a-f]{64}", part.sha256) for part in PARTS.values())
    for scale in params["scales"].values():
        if scale["corpus"]["source"] == "hub":
            assert commit.fullmatch(scale["corpus"]["revision"])
        if scale["teacher"]["revision"] is not None:
            assert commit.fullmatch(scale["teacher"]["revision"])
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in line for line in pinned if line.strip() and not line.startswith("#"))


@given(text=st.text())
def test_what_reaches_the_terminal_cannot_steer_it(text: str) -> None:
    shown = plain(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert plain(shown) == shown
    assert shown == text or not all(c.isprintable() or c == "\n" for c in text) or "://" in text or "hf_" in text


ESCAPES = "\x1b[2J\x1b]0;title\x07\r\x08\u202e\x9b31m"


def test_a_message_and_a_banner_show_escape_sequences_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> None:
        banner(f"teacher: {ESCAPES}", [f"model {ESCAPES}"])
        raise UserError(f"{ESCAPES}: not a folder; name one")

    with pytest.raises(SystemExit):
        run_stage(stage)
    out, err = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in out + err)
    assert err.count("\n") == 1 and "\\x1b[2J" in err


@pytest.mark.parametrize(
    "text", [f"cannot reach http://user:hunter2@host/x?token={TOKEN}", f"401 for {TOKEN}", "hunter2 was refused"]
)
def test_secrets_are_left_out_of_messages(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    assert "hunter2" not in plain(text) and TOKEN not in plain(text)


@pytest.mark.parametrize("stage", ["fetch", "teacher"])
def test_no_token_or_password_reaches_output_or_files(stage: str, tmp_path: Path) -> None:
    """With a hub and an index that do not answer, whose addresses hold a password."""
    local, hub = "model: data/tiny-teacher\n      revision:", f"model: a/b\n      revision: {'0' * 40}"
    text = tiny_parameters().replace(local, hub)
    (tmp_path / "params.yaml").write_text(text)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "HF_"))},
        "PYTHONPATH": str(ROOT),
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": "http://user:hunter2@127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hub"),
        "PIP_INDEX_URL": "http://user:hunter2@127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
    }
    if stage == "teacher":
        code = (
            "import torch\nfrom microlm.models.teacher_source import teacher_source\n"
            "from microlm.config import load_config\n"
            "from microlm.errors import run_stage\n"
            "run_stage(lambda: teacher_source(load_config().at.teacher).load(torch.float32))"
        )
        command = [sys.executable, "-c", code]
    else:
        command = [sys.executable, "-m", "stages.fetch"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    written = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("hunter2", TOKEN):
        assert secret not in ended.stdout + ended.stderr + written, ended.stderr
    assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1
