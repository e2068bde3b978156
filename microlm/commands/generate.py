"""`microlm generate`: what models write after a prompt, as they write it."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from microlm.commands.named_models import HELP, load_named, normal_name, refuse_repetition
from microlm.errors import UserError, plain
from microlm.parameters import RuntimeConfig

if TYPE_CHECKING:
    from microlm.evaluation.generation import Continuation, Decoding, Writer

Commands = Any  # argparse's own type of what add_subparsers returns has no public name
NARROWEST = 36  # a column of text below this is harder to read than texts one under another
SAMPLING = ("temperature", "top_k", "top_p", "seed")
MOST_SEED = 2**32 - 1  # of numpy, which transformers.set_seed seeds too


def add_parser(commands: Commands) -> None:
    add = commands.add_parser("generate", help="let models write, side by side").add_argument
    add("models", nargs="+", metavar="MODEL", help=HELP)
    add("--prompt", action="append", required=True, metavar="TEXT", help="may be given again; - reads it from stdin")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--do-sample", action="store_true", help="draw each token (else the likeliest; implied by the next four)")
    add("--temperature", type=float, metavar="X", help="divides the logits")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest")
    add("--top-p", type=float, metavar="P", help="draw among the likeliest that have probability P together")
    add("--seed", type=int, metavar="N", help="the same gives the same text (default 0)")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: against tokens that are there already")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="default float32")
    add("--json", action="store_true", help="a line of JSON for each continuation")


def run(arguments: argparse.Namespace) -> None:
    names = [normal_name(name) for name in arguments.models]
    refuse_repetition("MODEL", names)
    _refuse_numbers(arguments)
    prompts = _prompts(arguments.prompt)

    from microlm.evaluation.generation import Decoding, Writer
    from microlm.runtime.device import set_up

    runtime = set_up(RuntimeConfig(dtype=arguments.dtype, compile="off", threads="auto"))
    writers = []
    for name in names:  # a mistake in the last model or prompt is told before the first one writes
        candidate = load_named(name, runtime.dtype)
        candidate.model.to(runtime.device)
        writers.append(Writer(candidate))
    for writer in writers:
        for prompt in prompts:
            writer.encode(prompt)
    decoding = Decoding(
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample or any(getattr(arguments, name) is not None for name in SAMPLING),
        **{name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")},
    )
    show = _json if arguments.json else _columns if _fit(len(names)) else _blocks
    for prompt in prompts:
        show(writers, prompt, decoding, arguments.seed or 0)


def _refuse_numbers(arguments: argparse.Namespace) -> None:
    """UserError for the first that transformers would not take, or would take for something else."""
    above_zero = "is not a number above 0"
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "max_new_tokens": (lambda n: n >= 1, "is less than 1"),
        "temperature": (lambda x: 0 < x < math.inf, f"{above_zero}; for the likeliest tokens leave it out"),
        "top_k": (lambda n: n >= 1, "is less than 1"),
        "top_p": (lambda p: 0 < p <= 1, "is no probability above 0"),
        "seed": (lambda n: 0 <= n <= MOST_SEED, f"is not between 0 and {MOST_SEED}"),
        "repetition_penalty": (lambda x: 0 < x < math.inf, above_zero),
    }
    for name, (right, told) in rules.items():
        value = getattr(arguments, name)
        if value is not None and not right(value):
            raise UserError(f"--{name.replace('_', '-')}: {value} {told}")


def _prompts(given: Sequence[str]) -> list[str]:
    """Texts; `-` is what stdin holds, without the line's end after it."""
    if given.count("-") > 1:
        raise UserError("--prompt: - is given twice, and stdin can be read once; give it once")
    prompts = []
    for prompt in given:
        if prompt == "-":
            content = sys.stdin.buffer.read()
            prompt = content.decode("utf-8", errors="surrogateescape").removesuffix("\n").removesuffix("\r")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # Python keeps a byte that is no UTF-8 as half of a pair
            raise UserError(
                f"--prompt: is not UTF-8 from character {error.start} on; write it in a UTF-8 terminal or file"
            ) from None
        prompts.append(prompt)
    return prompts


def _fit(models: int) -> bool:
    """Whether the terminal, if it is one, is wide enough for a column of text for each model."""
    wide = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return wide and models > 1 and os.get_terminal_size(sys.stdout.fileno()).columns // models >= NARROWEST


def _shown(text: str) -> str:
    """`plain`, with tabs."""
    return "\t".join(map(plain, text.split("\t")))


def _note(found: "Continuation", decoding: "Decoding") -> str:
    """What there is to know of a text beside it."""
    count = f"{found.tokens} token{'s' if found.tokens != 1 else ''}"
    if found.ended:
        return f"({count}, and its end)"
    return f"({count})" if found.tokens == decoding.max_new_tokens else f"({count}: no position is left)"


def _blocks(writers: "Sequence[Writer]", prompt: str, decoding: "Decoding", seed: int) -> None:
    """One under another, each as it is written."""
    for writer in writers:
        print(f"{plain(writer.name)}\n{_shown(prompt)}", end="", flush=True)
        try:
            found = writer.write(prompt, decoding, seed, lambda text: print(_shown(text), end="", flush=True))
        except KeyboardInterrupt:
            print(flush=True)  # what is told of it begins a line
            raise
        print(f"\n{_note(found, decoding)}\n", flush=True)


def _columns(writers: "Sequence[Writer]", prompt: str, decoding: "Decoding", seed: int) -> None:
    """Side by side, the left one first, each as it is written."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = [Text(_shown(prompt), style="dim") for _ in writers]

    def table() -> Table:
        drawn = Table(*(plain(writer.name) for writer in writers), box=None, expand=True, padding=(0, 2, 0, 0))
        for column in drawn.columns:
            column.ratio = 1
        drawn.add_row(*texts)
        return drawn

    with Live(table(), console=Console(highlight=False), auto_refresh=False) as live:
        for writer, text in zip(writers, texts):

            def hear(piece: str, text: Text = text) -> None:
                text.append(_shown(piece), style="not dim")
                live.update(table(), refresh=True)

            found = writer.write(prompt, decoding, seed, hear)
            text.append(f"\n{_note(found, decoding)}", style="dim")
            live.update(table(), refresh=True)
    print(flush=True)


def _json(writers: "Sequence[Writer]", prompt: str, decoding: "Decoding", seed: int) -> None:
    for writer in writers:
        found = asdict(writer.write(prompt, decoding, seed))
        told = {"model": writer.name, "prompt": prompt, "continuation": found.pop("text"), **found}
        print(json.dumps(told, ensure_ascii=False), flush=True)
