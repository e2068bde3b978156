"""Make the page that `dvc plots` fills, with vega inside it: it draws without a network (`make plots-page`).

DVC's own page loads vega from the web. `.dvc/config` names this one instead (plots.html_template).
"""

from pathlib import Path

from microlm.errors import UserError
from microlm.files import atomic_file

PAGE = Path(".dvc/plots/offline.html")
VEGA_LITE = "5.20"  # of the major version that the templates in .dvc/plots and DVC's own are written in
# DVC replaces these words wherever they stand in the page, so that the bundle may not hold them
PLACEHOLDERS = ("{plot_divs}", "{refresh_tag}", "{scripts}")

HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{refresh_tag}
<title>MicroLM: plots</title>
<style>
body { font: 14px sans-serif; display: flex; flex-wrap: wrap; gap: 24px; margin: 24px; }
img { max-width: 640px; }
</style>
<!-- vega, vega-lite and vega-embed: BSD-3-Clause, University of Washington Interactive Data Lab; see ATTRIBUTION.md -->
<script>
BUNDLE
</script>
</head>
<body>
{plot_divs}
</body>
</html>
"""


def offline_page(bundle: str) -> str:
    """The page around `bundle`, a classic script that defines `window.vegaEmbed`.

    Raises:
        ValueError: the bundle would break the page: it holds a placeholder of DVC's or ends the script element.
    """
    for forbidden in (*PLACEHOLDERS, "</script"):
        if forbidden in bundle:
            raise ValueError(f"the vega bundle holds {forbidden!r}")
    return HTML.replace("BUNDLE", bundle.strip())


def vega_bundle(page: Path = PAGE) -> str:
    """The bundle out of the committed page. UserError where the page is absent or holds none."""
    mend = "take it from the repository: git checkout -- .dvc/plots, or make it again: make plots-page"
    try:
        _, _, rest = page.read_text(encoding="utf-8").partition("<script>\n")
    except FileNotFoundError:
        raise UserError(f"{page} is not there; {mend}") from None
    bundle, end, _ = rest.partition("\n</script>")
    if not end or "window.vegaEmbed" not in bundle:
        raise UserError(f"{page} holds no vega; {mend}")
    return bundle


def main() -> None:
    import vl_convert  # of the extra `docs`: nothing else needs it

    page = offline_page(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=VEGA_LITE))
    with atomic_file(PAGE, "w") as file:
        file.write(page)
    print(f"{PAGE}: {len(page.encode()):,} bytes")


if __name__ == "__main__":
    main()
