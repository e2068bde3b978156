"""docs/report.png: the committed page as a real browser shows it, for README (`make report-picture`).

Its beginning and its curves on a wide screen, in light; what the models write on a phone, in dark.
"""

import tempfile
from pathlib import Path

from PIL import Image

from microlm.files import atomic_file
from microlm.report.page.write import PAGE
from tests.support.browser import Browser, browser

PICTURE = Path("docs/report.png")
WIDE, PHONE, HEIGHT = (1280, 1520), (390, 844), 950  # of the screens, and of each in the picture
MARGIN, GROUND, COLOURS = 28, "#d9dbe0", 256


def shot(tab: Browser, size: tuple[int, int], section: str, dark: bool = False) -> Image.Image:
    """The screen with `section` at its top, as high as all screens are in the picture."""
    tab.show(*size, dark=dark, phone=size == PHONE)
    tab.open(PAGE)
    tab.run(f"document.querySelector({section!r}).scrollIntoView({{behavior: 'instant'}})")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        tab.picture(Path(file.name))
        with Image.open(file.name) as image:
            return image.convert("RGB").resize((HEIGHT * size[0] // size[1], HEIGHT), Image.Resampling.LANCZOS)


def main() -> None:
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as tab:
        screens = [
            shot(tab, WIDE, "header"),
            shot(tab, WIDE, "#training"),
            shot(tab, PHONE, "#samples", dark=True),
        ]
    width = sum(screen.width + MARGIN for screen in screens) + MARGIN
    picture, left = Image.new("RGB", (width, HEIGHT + 2 * MARGIN), GROUND), MARGIN
    for screen in screens:
        picture.paste(screen, (left, MARGIN))
        left += screen.width + MARGIN
    with atomic_file(PICTURE) as file:
        few = picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)  # keeps rare colours
        few.save(file, format="png", optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
