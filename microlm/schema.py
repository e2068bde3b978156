"""Dataclasses as a schema: a mapping becomes one, or each thing that is wrong with it becomes one line."""

import math
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal

LONGEST_SHOWN = 80  # characters of a value in a message
LARGEST_COUNT = 2**53
WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class Range:
    """Bounds of a number; an open bound is excluded."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return above and below  # False for NaN

    def __str__(self) -> str:
        low = f"{'more than' if self.low_open else 'at least'} {self.low:g}"
        high = f" and {'less than' if self.high_open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return low + high


def shown(value: Any) -> str:
    """`value` in a message: short, on one line, and whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits, which YAML reads in hexadecimal
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def within(*bounds: Any, default: Any = MISSING, **more: Any) -> Any:
    """A field whose number, or each of whose numbers, lies in a `Range`."""
    return field(default=default, metadata={"range": Range(*bounds, **more)})


count = partial(within, 1, LARGEST_COUNT)
positive = partial(within, 0, low_open=True)


def parse(cls: type, block: Any, where: str, found: list[str]) -> Any:
    """Build `cls` from a mapping; append what is wrong to `found` and return None then."""
    if not isinstance(block, dict):
        found.append(f"{where.rstrip('.')}: must be a block of keys and values, not {shown(block)}")
        return None
    before, hints, values = len(found), typing.get_type_hints(cls), {}
    known = {f.name: f for f in fields(cls)}
    for key in block:
        if key not in known:
            name = (key if isinstance(key, str) else shown(key)).encode("unicode_escape").decode()[:LONGEST_SHOWN]
            found.append(f"{where}{name}: unknown key; known here: {', '.join(k for k in known if k != 'at')}")
    for key, spec in known.items():
        if key in block:
            values[key] = _convert(block[key], hints[key], spec.metadata.get("range"), where + key, found)
        elif spec.default is MISSING:
            found.append(f"{where}{key}: missing; add it")
    if len(found) > before:
        return None
    built = cls(**values)
    found.extend(where + problem for problem in getattr(built, "problems", tuple)())
    return built


def _convert(value: Any, hint: Any, bounds: Range | None, where: str, found: list[str]) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    for option in options:
        if _is_list_of_blocks(option) and isinstance(value, list) and value:
            cls = typing.get_args(option)[0]
            return [parse(cls, block, f"{where}[{place}].", found) for place, block in enumerate(value)]
        if is_dataclass(option) and (isinstance(value, option) or (value is None and where == "at")):
            return value
        if is_dataclass(option) and (isinstance(value, dict) or len(options) == 1):
            return parse(option, value, where + ".", found)
        converted = _match(value, option)
        if converted is not MISSING:
            for number in converted if isinstance(converted, list) else [converted]:
                if bounds and isinstance(number, int | float) and number not in bounds:
                    found.append(f"{where}: {shown(number)} is out of range; it must be {bounds}")
            return converted
    found.append(f"{where}: {shown(value)} is not {' or '.join(map(_describe, options))}{_advice(value, options)}")
    return None


def _is_list_of_blocks(option: Any) -> bool:
    return typing.get_origin(option) is list and is_dataclass(typing.get_args(option)[0])


def _match(value: Any, option: Any) -> Any:
    """`value` as `option`, or MISSING where it is of another type. A bool is never a number, an empty text no text."""
    if typing.get_origin(option) is list:
        items = [_match(v, typing.get_args(option)[0]) for v in value] if isinstance(value, list) else []
        return MISSING if not items or any(v is MISSING for v in items) else items
    if typing.get_origin(option) is Literal:
        return value if isinstance(value, str) and value in typing.get_args(option) else MISSING
    if option is float:
        return float(value) if type(value) in (int, float) and abs(value) < 1e300 else MISSING
    return value if type(value) is option and value != "" else MISSING


def _describe(option: Any) -> str:
    if _is_list_of_blocks(option):
        return "a list of blocks of keys and values"
    if is_dataclass(option):
        return f"a block of {', '.join(f.name for f in fields(option))}"
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    if typing.get_origin(option) is list:
        (inner,) = typing.get_args(option)
        if typing.get_origin(inner) is Literal:
            return f"a list of {', '.join(typing.get_args(inner))}"
        return f"a list of {WORDS[inner].removeprefix('a ')}s"
    return WORDS[option]


def _advice(value: Any, options: tuple[Any, ...]) -> str:
    if isinstance(value, str) and {int, float} & set(options):
        try:
            return f"; write {float(value)!r} without quotes"
        except ValueError:
            return "; write it as digits, e.g. 0.2 or 6.0e-4" if float in options else "; write it as digits, e.g. 64"
    if isinstance(value, float) and value.is_integer() and int in options:
        return f"; write {int(value)}"
    return ""
