"""Dataclasses as a schema: a mapping becomes one, or each thing that is wrong with it becomes one line."""

import math
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

LONGEST_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Range:
    """Bounds of a number; an open bound is excluded."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return above and below  # False for NaN

    def __str__(self) -> str:
        low = f"{'more than' if self.low_open else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'less than' if self.high_open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "finite"


def shown(value: Any) -> str:
    """`value` in a message: short, on one line, and whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an integer of thousands of digits, which YAML reads in hexadecimal
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def within(*bounds: Any, default: Any = MISSING, **more: Any) -> Any:
    return field(metadata={"range": Range(*bounds, **more)}, **({} if default is MISSING else {"default": default}))


POSITIVE = Range(0, math.inf, low_open=True, high_open=True)
COUNT = Range(1, 2**53)


def count() -> Any:
    return field(metadata={"range": COUNT})


def positive() -> Any:
    return field(metadata={"range": POSITIVE})


def parse(cls: type, block: Any, where: str, found: list[str]) -> Any:
    """Build `cls` from a mapping; append what is wrong to `found` and return None then."""
    if block is None and where == "":
        return None
    if not isinstance(block, dict):
        found.append(f"{where.rstrip('.')}: must be a block of keys and values, not {shown(block)}")
        return None
    before = len(found)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in block:
        if key not in known:
            name = (key if isinstance(key, str) else shown(key)).encode("unicode_escape").decode()[:LONGEST_SHOWN]
            found.append(f"{where}{name}: unknown key; known here: {', '.join(k for k in known if k != 'at')}")
    values = {}
    for key, spec in known.items():
        if key in block:
            values[key] = _convert(block[key], hints[key], spec.metadata.get("range"), where + key, found)
        elif spec.default is MISSING:
            found.append(f"{where}{key}: missing; add it")
    if len(found) > before:
        return None
    built = cls(**values)
    found.extend(where + problem for problem in getattr(built, "problems", list)())
    return built


def _convert(value: Any, hint: Any, bounds: Range | None, where: str, found: list[str]) -> Any:
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return (
            value
            if isinstance(value, hint) or (value is None and where == "at")
            else parse(hint, value, where + ".", found)
        )
    if typing.get_origin(hint) is list and hasattr(typing.get_args(hint)[0], "__dataclass_fields__"):
        if not isinstance(value, list) or not value:
            found.append(f"{where}: {shown(value)} is not a list of blocks of keys and values")
            return None
        return [parse(typing.get_args(hint)[0], block, f"{where}[{i}].", found) for i, block in enumerate(value)]
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if isinstance(value, dict) and hasattr(option, "__dataclass_fields__"):
            return parse(option, value, where + ".", found)
        converted = _match(value, option)
        if converted is not MISSING:
            numbers = converted if isinstance(converted, list) else [converted]
            for number in numbers:
                if bounds and isinstance(number, (int, float)) and number not in bounds:
                    found.append(f"{where}: {shown(number)} is out of range; it must be {bounds}")
            return converted
    found.append(f"{where}: {shown(value)} is not {_describe(options)}{_advice(value, options)}")
    return None


def _match(value: Any, option: Any) -> Any:
    """`value` as `option`, or MISSING where it is of another type. A bool is never a number."""
    if option is type(None):
        return None if value is None else MISSING
    if typing.get_origin(option) is Literal:
        return value if isinstance(value, str) and value in typing.get_args(option) else MISSING
    if typing.get_origin(option) is list:
        items = (
            [_match(v, typing.get_args(option)[0]) for v in value] if isinstance(value, list) and value else [MISSING]
        )
        return MISSING if any(v is MISSING for v in items) else items
    if option is float:
        return (
            float(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            else MISSING
        )
    if option is bool:
        return value if isinstance(value, bool) else MISSING
    if option is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else MISSING
    return value if isinstance(value, option) and value != "" else MISSING


def _describe(options: tuple[Any, ...]) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is Literal:
            names.append("one of " + ", ".join(typing.get_args(option)))
        elif hasattr(option, "__dataclass_fields__"):
            names.append(f"a block of {', '.join(option.__dataclass_fields__)}")
        elif typing.get_origin(option) is list:
            names.append(
                "a list of " + {float: "numbers", int: "whole numbers", str: "texts"}[typing.get_args(option)[0]]
            )
        else:
            names.append(
                {float: "a number", int: "a whole number", str: "a text", type(None): "null", bool: "true or false"}[
                    option
                ]
            )
    return " or ".join(names)


def _advice(value: Any, options: tuple[Any, ...]) -> str:
    if isinstance(value, str) and {int, float} & set(options):
        try:
            return f"; write {float(value)!r} without quotes"
        except ValueError:
            return "; write it as digits, e.g. 0.2 or 6.0e-4" if float in options else "; write it as digits, e.g. 64"
    if isinstance(value, float) and value.is_integer() and int in options:
        return f"; write {int(value)}"
    return ""
