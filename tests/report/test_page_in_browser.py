"""The page in a real browser: drawn, quiet, readable in dark and light, on a phone, printed, and by a screen reader."""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from microlm.evaluation import SCORED_MODELS
from microlm.files import read_json
from tests.support.browser import Browser, browser
from tests.support.laptop_run import PROMPTS, lay_out, write_report, write_samples

PROBE = (Path(__file__).parent / "page_probe.js").read_text()
WIDE, PHONE = 1280, 390
THEMES = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
WIDTHS = pytest.mark.parametrize("width", [WIDE, PHONE, 320])
PAGES = pytest.mark.parametrize("kind", ["plain", "nasty"])
SAID = {name: [f" {name} says {place}\n  <b>&amp; on." for place in range(len(PROMPTS))] for name in SCORED_MODELS}
NASTY = [
    "</script><script>window.taken = 1</script>",
    '"><img src=x onerror="window.taken = 1"><svg onload="window.taken = 1">',
    "",
    "\x00\x1b[31m\r\n\ud800\u202e\ufeff",
    "w" * 4000,
    "<!--",
    "{{ 7 * 7 }}\n\n\n   ",
    "\U0001f600" * 300,
]
# of vega-embed, of a bundle that draws with a newer vega than this vega-lite was compiled for; it changes nothing
KNOWN = "The compiled spec uses Vega v5, but current version is v6"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of the committed run; and one of inputs as bad as a run can have them."""
    plain, nasty = (tmp_path_factory.mktemp(name) for name in ("plain", "nasty"))
    for top in (plain, nasty):
        lay_out(top)
    write_samples(plain, SAID)
    write_samples(nasty, dict.fromkeys(("control", "student"), NASTY), prompts=NASTY)
    summary = read_json(nasty / "metrics/summary.json", "compare")
    for block in (summary, *summary.values()):
        for key in [key for key in block if "outside" in key or "ood" in key] if isinstance(block, dict) else ():
            del block[key]
    first = summary["benchmarks"][0]
    first["task"] = "</script><b>a task of a very long name that never ends"
    for row in summary["benchmarks"]:
        if "student_minus_continued" in row:
            row["student_minus_continued"] |= {"difference": 0.0, "low": 0.0, "high": 0.0}
    (nasty / "metrics/summary.json").write_text(json.dumps(summary))
    return {"plain": write_report(plain), "nasty": write_report(nasty, path="/" + "<deep>/" * 500 + NASTY[0])}


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def ask(tab: Browser, question: str) -> Any:
    return tab.run(f"({PROBE}).{question}")


def complaints(tab: Browser) -> list[str]:
    """All that the console shows, and every address that was asked for but the page's own."""
    said = [" ".join(str(a.get("value")) for a in call["args"]) for call in tab.reported("Runtime.consoleAPICalled")]
    said += [str(failure["exceptionDetails"]) for failure in tab.reported("Runtime.exceptionThrown")]
    said += [str(entry["entry"]) for entry in tab.reported("Log.entryAdded")]
    said += [request["request"]["url"] for request in tab.reported("Network.requestWillBeSent")[1:]]
    return [line for line in said if KNOWN not in line]


@PAGES
@THEMES
@WIDTHS
def test_every_figure_is_drawn_within_the_page_and_the_console_is_silent(
    tab: Browser, pages: dict[str, Path], width: int, dark: bool, kind: str
) -> None:
    tab.show(width, dark=dark, phone=width < WIDE)
    tab.open(pages[kind])
    assert complaints(tab) == []
    figures = ask(tab, "figures()")
    assert len(figures) == (6 if kind == "plain" else 5)
    for figure in figures:
        assert figure["width"] > 200 and figure["height"] > 80 and figure["inside"], figure
        assert figure["points"] == figure["rows"] > 0, figure
        forest = figure["key"] in ("chart-bits", "chart-points")
        assert forest or figure["lines"] >= 3, figure
    # innerWidth would not do: a phone zooms out until all of a page that is too wide is inside
    assert tab.run("document.documentElement.scrollWidth") <= width, ask(tab, "sticking_out()")
    assert ask(tab, "sticking_out()") == []
    assert ask(tab, "faint()") == []
    assert tab.run("typeof window.taken") == "undefined"


def test_themes_differ_and_paper_is_light_in_print(tab: Browser, pages: dict[str, Path]) -> None:
    def paper_and_line() -> tuple[str, str]:
        line = "getComputedStyle(document.querySelector('#chart-val_bpb .mark-line path')).stroke"
        return tab.run("getComputedStyle(document.body).backgroundColor"), tab.run(line)

    tab.show(WIDE)
    tab.open(pages["plain"])
    light = paper_and_line()
    tab.show(WIDE, dark=True)
    dark = paper_and_line()
    tab.show(WIDE, dark=True, media="print")
    printed = paper_and_line()
    assert light[0] != dark[0] and light[1] != dark[1]  # the figures follow without being drawn again
    assert printed == ("rgb(255, 255, 255)", light[1])


@PAGES
def test_print_shows_every_figure_and_no_button(tab: Browser, pages: dict[str, Path], kind: str) -> None:
    tab.show(WIDE, dark=True)
    tab.open(pages[kind])
    tab.show(680, media="print", dark=True)  # the width of a sheet of A4 between its margins
    assert ask(tab, "faint()") == []
    assert ask(tab, "sticking_out()") == []
    assert all(figure["inside"] and figure["width"] > 200 for figure in ask(tab, "figures()"))
    assert tab.run("[...document.querySelectorAll('button, nav')].every(e => !e.getClientRects().length)")
    assert tab.run("[...document.querySelectorAll('figure')].every(e => getComputedStyle(e).breakInside == 'avoid')")
    tab.show(WIDE)
    assert tab.pdf().startswith(b"%PDF")


def test_samples_are_what_the_models_wrote(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(WIDE)
    tab.open(pages["plain"])
    told = "[...document.querySelectorAll('p.text')].map(p => [p.dataset.model + p.dataset.place, p.textContent])"
    assert dict(tab.run(told)) == {f"{name}{place}": text for name in SAID for place, text in enumerate(SAID[name])}
    assert tab.run("[...document.querySelectorAll('.prompt h3')].map(h => h.textContent)") == list(PROMPTS)


def test_a_screen_reader_finds_headings_named_figures_tables_and_regions(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(WIDE)
    tab.open(pages["plain"])
    tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    nodes = [node for node in tab.ask("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]

    def names(role: str) -> list[str]:
        return [node["name"]["value"] for node in nodes if node["role"]["value"] == role]

    headings = [node["properties"] for node in nodes if node["role"]["value"] == "heading"]
    levels = [said["value"]["value"] for of in headings for said in of if said["name"] == "level"]
    assert levels[0] == 1 and levels.count(1) == 1 and max(below - above for above, below in pairwise(levels)) <= 1
    images = names("image")
    assert len(images) == 6 and sum("Line chart" in name for name in images) == 4
    assert not any(node["role"]["value"].startswith("graphics-") for node in nodes)  # no mark is read out by itself
    assert len(names("figure")) == 6 and all(names("figure"))
    assert all(names("table")) and all(names("region")) and all(names("button")) and all(names("navigation"))
    assert {"main", "banner", "contentinfo"} <= {node["role"]["value"] for node in nodes}
    assert tab.run("[...document.querySelectorAll('.scroll')].every(region => region.tabIndex == 0)")


def test_buttons_fade_an_arm_and_change_the_axes(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(WIDE)
    tab.open(pages["plain"])
    lines = "[...document.querySelectorAll('#chart-val_loss .mark-line path:not([stroke-dasharray])')]"
    opacities = f"{lines}.map(line => Number(line.getAttribute('opacity') ?? 1))"
    axis = "document.querySelector('#chart-val_loss .role-axis-title text').textContent"
    heights = "document.querySelector('#chart-val_loss .mark-symbol').innerHTML"
    assert tab.run(opacities) == [1, 1, 1]
    tab.run("document.querySelector('[data-arm=student]').click()")
    tab.wait(f"{opacities}.some(o => o < 0.5)")
    assert sorted(tab.run(opacities)) == [0.1, 1, 1]
    before = tab.run(heights)
    tab.run("document.querySelector('[data-value=linear]').click()")
    tab.wait(f"{heights} != {json.dumps(before)}")
    tab.run("document.querySelector('[data-value=tokens]').click()")
    tab.wait(f"{axis} == 'tokens'")
    assert sorted(tab.run(opacities)) == [0.1, 1, 1]  # an arm that was switched off stays so
    before = tab.run("document.querySelector('#chart-val_bpb svg').outerHTML")
    tab.run("document.querySelector('[data-start]').click()")
    tab.wait(f"document.querySelector('#chart-val_bpb svg').outerHTML != {json.dumps(before)}")
    pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.textContent.trim())"
    assert tab.run(pressed) == ["control", "continued", "tokens", "linear", "untrained start"]
    assert complaints(tab) == []


def test_a_point_tells_its_numbers(tab: Browser, pages: dict[str, Path]) -> None:
    tab.show(WIDE, 1200)
    tab.open(pages["plain"])
    tab.run("document.querySelector('#chart-ood_bpb').scrollIntoView({block: 'center', behavior: 'instant'})")
    box = tab.run("document.querySelector('#chart-ood_bpb svg').getBoundingClientRect().toJSON()")
    for shift in (0, 3):
        x, y = box["x"] + box["width"] / 2 + shift, box["y"] + box["height"] / 2
        tab.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.wait("document.querySelector('#vg-tooltip-element')?.classList.contains('visible')")
    told = tab.run("document.querySelector('#vg-tooltip-element').innerText")
    assert all(word in told for word in ("arm", "step", "tokens", "bits per byte"))
    assert ask(tab, "faint()") == []


def test_without_scripts_the_page_reads_and_says_that_figures_are_not_drawn(
    tab: Browser, pages: dict[str, Path]
) -> None:
    tab.show(PHONE, phone=True)
    tab.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["plain"], scripts=False)
        assert tab.run("[...document.querySelectorAll('.undrawn')].filter(p => p.getClientRects().length).length") == 6
        assert tab.run("document.querySelector('.controls').getClientRects().length") == 0
        assert tab.run("document.querySelector('.legend').getClientRects().length") == 1
        assert ask(tab, "faint()") == [] and ask(tab, "sticking_out()") == []
    finally:
        tab.ask("Emulation.setScriptExecutionDisabled", value=False)
