"""The page that `dvc plots` fills draws without a network."""

import json
import re
from pathlib import Path

import pytest

from microlm.report.offline_page import PAGE, PLACEHOLDERS, offline_page
from tests.support.clones import ROOT

SIZE_LIMIT_BYTES = 1 << 20
TEMPLATES = sorted((ROOT / ".dvc" / "plots").glob("*.json"))


def test_committed_page_loads_nothing_from_elsewhere() -> None:
    page = (ROOT / PAGE).read_text()
    assert len(page.encode()) <= SIZE_LIMIT_BYTES
    assert [page.count(word) for word in PLACEHOLDERS] == [1, 1, 0]  # without {scripts} DVC adds none of its own
    assert re.findall(r"<script[^>]+src|<link|@import", page) == []
    assert page.count("window.vegaEmbed") == 1
    assert f"html_template = {PAGE.relative_to('.dvc')}" in (ROOT / ".dvc" / "config").read_text()


@pytest.mark.parametrize("bundle", ["a </script> b", *PLACEHOLDERS])
def test_bundle_that_would_break_the_page_is_refused(bundle: str) -> None:
    with pytest.raises(ValueError, match="the vega bundle holds"):
        offline_page(bundle)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_template_takes_data_and_axes_from_dvc(template: Path) -> None:
    text = template.read_text()
    json.loads(text)
    for anchor in ("DATA", "TITLE", "X", "Y", "X_LABEL", "Y_LABEL"):
        assert f'"<DVC_METRIC_{anchor}>"' in text


def test_template_of_hellaswag_draws_chance_and_gpt2() -> None:
    [template] = [json.loads(path.read_text()) for path in TEMPLATES if path.stem == "arms_hellaswag"]
    levels = template["layer"][1]["data"]["values"]
    assert [line["level"] for line in levels] == [0.25, 0.2955]
