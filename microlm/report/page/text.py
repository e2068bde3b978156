"""Others' words in the page: models write them, and files and parameters hold them; any of it must come back equal."""

import re

from markupsafe import Markup, escape

# What HTML cannot hold or changes on the way (NUL, lone surrogates, a carriage return), what no reader could see, and
# what turns the direction of the text around it. Each is written out, in an element that says which character it is.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ud800-\udfff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
    + "]"
)


def visible(text: object) -> Markup:
    """`str(text)` as HTML, in which each character of `UNSEEN` is an element `<i data-code="hexadecimal">`."""
    parts, end = [], 0
    for found in UNSEEN.finditer(words := str(text)):
        code = f"{ord(found[0]):04X}"
        parts += [escape(words[end : found.start()]), Markup('<i data-code="{0}" title="U+{0}">U+{0}</i>').format(code)]
        end = found.end()
    return Markup("").join([*parts, escape(words[end:])])
