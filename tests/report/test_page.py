"""The page says what the summary says, holds any text unchanged, loads nothing, and is the same bytes again."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlm.errors import UserError
from microlm.evaluation import SCORED_MODELS
from microlm.files import read_json
from microlm.report.offline_page import PAGE as OFFLINE
from microlm.report.offline_page import vega_bundle
from microlm.report.page.samples import read_samples
from microlm.report.page.text import visible
from microlm.report.page.write import PAGE, flat
from microlm.report.summary_table import markdown, sentences
from tests.support.clones import ROOT
from tests.support.laptop_run import PROMPTS, lay_out, write_report, write_samples
from tests.support.workspace import inside

SIZE_LIMIT_BYTES = 1_200_000
SAID = {name: [f" {name} says {place} <b>&amp;" for place in range(len(PROMPTS))] for name in SCORED_MODELS}


class Reader(HTMLParser):
    """What a browser's tree would hold: texts by the element that they stand in, unseen characters as what they are."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: dict[tuple[str, str], str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[tuple[str, str]] = []
        self._written_out = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "i" and "data-code" in found:
            self._add(chr(int(found["data-code"], 16)))
            self._written_out = True
        elif tag in ("p", "h3", "th", "td", "script"):
            key = f"{found.get('data-model', '')}{found.get('data-place', '')}" or found.get("id") or ""
            self._open.append((tag, key))

    def handle_endtag(self, tag: str) -> None:
        if tag == "i":
            self._written_out = False
        elif self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._written_out:
            self._add(data)

    def _add(self, text: str) -> None:
        if self._open:
            self.texts[self._open[-1]] = self.texts.get(self._open[-1], "") + text


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    lay_out(tmp_path)
    write_samples(tmp_path, SAID)
    return tmp_path


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(
    [
        "</script>",
        "<!--",
        "]]>",
        "&lt;",
        "\r\n",
        "\x00",
        "\ud800",
        "\u202eabc",
        "\ufeff",
        "{{ 7 * 7 }}",
        "{% raw %}",
        "\\u003c",
    ]
)


@given(ANY_TEXT)
def test_any_text_comes_back_equal_from_the_page(text: str) -> None:
    html = f"<p>{visible(text)}</p>"
    html.encode()  # no lone surrogate is left
    assert Reader(html).texts.get(("p", ""), "") == text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)


def test_page_says_what_the_summary_says(laptop: Path) -> None:
    page, summary = write_report(laptop).read_text(), read_json(laptop / "metrics/summary.json", "compare")
    shown = "".join(Reader(page).texts.values())
    for sentence in sentences(summary):
        assert sentence in shown or sentence in page
    for row in markdown(summary).splitlines():
        cells = [cell.strip() for cell in row.strip("|").split("|")] if row.startswith("| ") else []
        assert [cell for cell in cells if cell not in shown] == []
    assert len(page.encode()) < SIZE_LIMIT_BYTES


def test_page_holds_what_the_models_wrote_and_the_prompts(laptop: Path) -> None:
    texts = Reader(write_report(laptop).read_text()).texts
    for place, prompt in enumerate(PROMPTS):
        assert texts["h3", f"prompt-{place}"] == prompt
        for name in SCORED_MODELS:
            assert texts["p", f"{name}{place}"] == SAID[name][place]


def test_page_loads_nothing_and_runs_only_its_own_scripts(laptop: Path) -> None:
    page = write_report(laptop).read_text()
    tags = Reader(page).tags
    assert [
        found for tag, found in tags if "src" in found or tag in ("iframe", "object", "embed", "base", "form")
    ] == []
    assert [found["href"] for tag, found in tags if tag == "link"] == ["data:,"]
    assert all(found["href"].startswith("#") for tag, found in tags if tag == "a")
    [policy] = [found["content"] for tag, found in tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and policy.count("'sha256-") == 2
    assert not [found for _, found in tags if any(name.startswith("on") for name in found)]


def test_headings_go_down_by_one_and_tables_say_what_they_are(laptop: Path) -> None:
    tags = Reader(write_report(laptop).read_text()).tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption") == names.count("thead")
    assert all(found.get("scope") in ("col", "row") for tag, found in tags if tag == "th")
    ids = [found["id"] for _, found in tags if "id" in found]
    assert len(ids) == len(set(ids))
    named = {found[key] for _, found in tags for key in ("aria-labelledby",) if key in found}
    assert named <= set(ids)


def test_same_inputs_give_the_same_bytes(laptop: Path, tmp_path: Path) -> None:
    assert write_report(laptop).read_bytes() == write_report(laptop).read_bytes()


def test_run_without_samples_or_outside_text_says_so(laptop: Path) -> None:
    for name in SCORED_MODELS:
        (laptop / f"data/evaluation/{name}/samples.json").unlink()
    for path in (laptop / "plots/loss").iterdir():
        rows = [line.rpartition(",")[0] for line in path.read_text().splitlines()[1:]]
        path.write_text("\n".join([path.read_text().splitlines()[0], *(f"{row}," for row in rows)]) + "\n")
    summary = read_json(laptop / "metrics/summary.json", "compare")
    for block in (summary, *summary.values()):
        for key in [key for key in block if "outside" in key or "ood" in key] if isinstance(block, dict) else ():
            del block[key]
    (laptop / "metrics/summary.json").write_text(json.dumps(summary))
    page = write_report(laptop).read_text()
    assert "This run has no samples" in page and "data-place" not in page
    assert 'id="chart-val_bpb"' in page and 'id="chart-ood_bpb"' not in page and "Outside it" not in page


def test_arms_are_told_by_what_they_start_from(laptop: Path) -> None:
    assert "the control, trained further with cross-entropy" in write_report(laptop).read_text()
    path = laptop / "metrics/summary.json"
    summary = read_json(path, "compare") | {"init": "scratch"}
    for name in ("continued", "student"):
        summary[name]["tokens_before"] = 0
    path.write_text(json.dumps(summary))
    shown = "".join(Reader(write_report(laptop).read_text()).texts.values())
    page = write_report(laptop).read_text()
    assert "the control&#39;s first weights, trained with cross-entropy" in page and "trained further" not in page
    assert "49.2k" in shown and "20.5k + " not in shown


def test_a_model_without_samples_is_named(laptop: Path) -> None:
    (laptop / "data/evaluation/control/samples.json").unlink()
    page = write_report(laptop).read_text()
    assert "control has no samples" in page and 'data-model="student"' in page and 'data-model="control"' not in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content["samples"].reverse(), "are not of the same prompts, decoded alike"),
        (lambda content: content.update(decoding="sampled"), "are not of the same prompts, decoded alike"),
        (lambda content: content["samples"].pop(), "are not of the same prompts, decoded alike"),
        (lambda content: content["samples"].clear(), r"student/samples\.json is damaged \(it has no sample\)"),
        (lambda content: content.pop("decoding"), r"student/samples\.json is damaged \('decoding'\)"),
        (lambda content: content["samples"][3].update(tokens="4"), "is damaged .tokens is not int"),
        (lambda content: content["samples"].append(None), "is damaged .not an object"),
    ],
)
def test_samples_that_cannot_stand_side_by_side_are_refused(laptop: Path, change, said: str) -> None:
    path = laptop / "data/evaluation/student/samples.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with inside(laptop), pytest.raises(UserError, match=said) as refused:
        read_samples()
    assert "dvc repro -f -s evaluate@" in str(refused.value) and "\n" not in str(refused.value)


def test_refusal_leaves_the_page_that_was_there(laptop: Path) -> None:
    before = write_report(laptop).read_bytes()
    (laptop / OFFLINE).unlink()
    with pytest.raises(UserError, match=r"offline\.html is not there; .*make plots-page"):
        write_report(laptop)
    (laptop / OFFLINE).write_text("<html></html>")
    with pytest.raises(UserError, match=r"offline\.html holds no vega"):
        write_report(laptop)
    assert (laptop / PAGE).read_bytes() == before


def test_bundle_is_the_one_in_the_committed_page() -> None:
    bundle = vega_bundle(ROOT / OFFLINE)
    assert bundle in (ROOT / OFFLINE).read_text() and "<script" not in bundle.split("window.vegaEmbed")[1]


def test_page_tells_no_secret(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "what nobody may read")
    secret = "https://me:pass@example.org/m", "hf_" + "a" * 30, "what nobody may read"
    page = write_report(laptop, at={"models": list(secret)}).read_text()
    assert "[https://[hidden]@example.org/m, [hidden], [hidden]]" in page and not any(
        word in page for word in ("me:pass", "hf_aaa", secret[2])
    )


def test_parameters_are_flat_and_written_as_yaml_has_them() -> None:
    block = {"alpha": 0.5, "at": {"tasks": [{"name": "a"}, {"name": None}], "none": {}, "on": True, "kept": [0, 1]}}
    assert dict(flat(block)) == {
        "alpha": "0.5", "at.tasks.0.name": "a", "at.tasks.1.name": "null", "at.none": "{}", "at.on": "true",
        "at.kept": "[0, 1]",
    }  # fmt: skip
