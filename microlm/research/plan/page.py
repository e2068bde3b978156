"""The plan as one page of text."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any

MEMORY_ROWS = ("weights", "gradients", "optimizer", "activations", "head", "teacher", "total", "cpu", "mapped")
SAID = {"head": "head and loss", "cpu": "without a GPU", "mapped": "mapped files"}  # of these, the others as they are
WIDTH = 100


def amount(value: float) -> str:
    """12_345_678 -> '12.3M'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}" if value < 999.5 * scale else f"{value / scale:.0f}{unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes in decimal units: 536_000_000_000 -> '536 GB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:,.{0 if value >= 99.5 * scale else 1}f} {unit}"
    return f"{value:.0f} bytes"


def spell_hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def page(plan: dict[str, Any]) -> str:
    """All but the disk, which is another one everywhere (`disk_lines`)."""
    parts = (_head(plan), _work(plan), _bytes(plan), _memory(plan["memory"]), _cache(plan))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _head(plan: dict[str, Any]) -> Iterator[str]:
    machine, student, teacher, tokens = (plan[key] for key in ("machine", "student", "teacher", "tokens"))
    gpus = machine["gpus"]
    yield f"plan of {plan['scale']}"
    yield (
        f"student   {student['parameters']:,} parameters: {student['layers']} layers, {student['hidden_size']} wide, "
        f"vocabulary {student['n_vocab']:,}"
    )
    alone = "" if teacher["layers"] else " (shape unknown: no attention in its FLOPs, no activations in its memory)"
    yield f"teacher   {teacher['model']}, {teacher['parameters']:,} parameters{alone}"
    yield f"corpus    {tokens['train']:,} training and {tokens['val']:,} validation tokens"
    yield (
        f"machine   {gpus} GPU{'s' if gpus > 1 else ''} of {machine['peak_tflops']:g} TFLOP/s, "
        f"{machine['utilisation']:.0%} of which are reached ({machine['source']})"
    )
    if plan["busy_share"] < 1:
        yield (
            f"warning   micro-batches a step: {plan['micro_batches']}, so that {plan['busy_share']:.1%} of {gpus} GPUs "
            "are busy; lower batch.micro_batch_rows"
        )


def _work(plan: dict[str, Any]) -> Iterator[str]:
    stages, priced = plan["stages"], plan["machine"]["price_per_gpu_hour"] is not None
    yield f"{'stage':<10}{'tokens':>9}{'steps':>9}{'FLOPs':>11}{'GPU-hours':>11}{'hours':>9}" + "    price" * priced
    summed = ("flops", "gpu_hours", "hours", *["price"] * priced)
    total = {"tokens": None, "steps": None} | {key: sum(one[key] for one in stages.values()) for key in summed}
    for name, one in {**stages, "all": total}.items():
        tokens = "" if one["tokens"] is None else amount(one["tokens"])
        steps = "" if one["steps"] is None else f"{one['steps']:,}"
        price = f"{one['price']:>9,.2f}" if priced else ""
        hours = f"{spell_hours(one['gpu_hours']):>11}{spell_hours(one['hours']):>9}"
        yield f"{name:<10}{tokens:>9}{steps:>9}{one['flops']:>11.2e}{hours}{price}"
    cost = plan["flops_per_token"]
    yield (
        f"FLOPs a token: {amount(cost['training'])} training (6 N + 12 L W T), {amount(cost['teacher'])} teacher "
        "(2 N + 4 L W T)"
    )
    yield "evaluate: three students and the teacher on held-out text and HellaSwag"
    if plan["uncounted_tasks"]:
        told = f"not counted, since their lengths are known with their data: {', '.join(plan['uncounted_tasks'])}"
        yield from wrap(told, WIDTH)


def _bytes(plan: dict[str, Any]) -> Iterator[str]:
    yield "on disk"
    for name, value in {**plan["bytes"], "all": sum(plan["bytes"].values())}.items():
        yield f"  {name:<18}{size(value):>9}"


def _memory(stages: dict[str, dict[str, int]]) -> Iterator[str]:
    yield f"{'memory of a GPU':<16}" + "".join(f"{name:>11}" for name in stages)
    for row in MEMORY_ROWS:
        if any(row in one for one in stages.values()):
            values = "".join(f"{size(one[row]) if row in one else '':>11}" for one in stages.values())
            yield f"  {SAID.get(row, row):<14}{values}".rstrip()
    yield "without a GPU: the process's resident set, libraries included; the system takes mapped files back at need"


def _cache(plan: dict[str, Any]) -> Iterator[str]:
    met, sources = plan["break_even"], plan["sources"]
    cache, live = sources["cache"], sources["live"]
    epochs = f"{met['epochs_a_student']} epoch{'s' if met['epochs_a_student'] > 1 else ''}"
    yield from wrap(
        f"cache: {plan['cache_bytes_per_token']} bytes a token; distill reads {size(met['read_bytes_per_s'])}/s for "
        f"each GPU. With the teacher live a step of distill takes {met['live_over_cached']:.2f} times as much",
        WIDTH,
    )
    turn = f"from student {sources['students_to_turn']} on the cache is"
    cheaper = "the cache is cheaper" if sources["cheaper_for_one_student"] == "cache" else f"live is cheaper, {turn}"
    yield from wrap(
        f"teacher.source: cache takes {spell_hours(cache['gpu_hours'])} GPU-hours once and {size(cache['bytes'])} of "
        f"disk, live {spell_hours(live['gpu_hours_a_student'])} GPU-hours for each student of {epochs} and no disk: "
        f"{cheaper}",
        WIDTH,
    )


def disk_lines(disk: dict[str, int]) -> str:
    lacking = f"lacks {size(disk['lacking'])}" if disk["lacking"] else "suffices"
    return (
        f"disk here: {size(disk['needed'])} needed, {size(disk['free'])} free: it {lacking}\n"
        f"(DVC's cache takes {size(disk['copies'])} more where it copies: docs/scale.md)"
    )
