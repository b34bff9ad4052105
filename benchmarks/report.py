"""Tables for people, and the bars that Mothball has to meet."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

MB = 1e6
ROWS = (
    ("first capture", "first_seconds", "s", 1.0),
    ("unchanged", "unchanged_seconds", "s", 1.0),
    ("1 % changed", "changed_seconds", "s", 1.0),
    ("stored, first", "first_stored", "MB", MB),
    ("stored, unchanged", "unchanged_stored", "MB", MB),
    ("stored, 1 % changed", "changed_stored", "MB", MB),
    ("peak memory, first", "first_peak", "MB", MB),
    ("peak memory, unchanged", "unchanged_peak", "MB", MB),
    ("one file read", "read_ms", "ms", 1.0),
)


def bars(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar with its limit, the measured value and whether it is met; None where it could not be measured."""
    medians, fleet, startup = found["medians"], found.get("fleet", {}), found.get("startup", {})

    def ratio(figure: str, other: str) -> float:
        return float(medians["mothball"][figure] / medians[other][figure]) if other in medians else math.nan

    big = [found.get("big", {}).get("mothball", {}).get("peak"), fleet.get("big_peak")]
    tree_peaks = [medians["mothball"].get(f"{stage}_peak") for stage in ("first", "unchanged", "changed")]
    rows = [
        ("first capture / restic", ratio("first_seconds", "restic"), 0.5, "x"),
        ("first capture / borg", ratio("first_seconds", "borg"), 0.35, "x"),
        ("first capture / tar | zstd -1", ratio("first_seconds", "tar | zstd -1"), 1.8, "x"),
        ("unchanged / restic", ratio("unchanged_seconds", "restic"), 0.2, "x"),
        ("peak memory of the worker, this tree", _largest([*tree_peaks, fleet.get("tree_peak")]) / MB, 200, "MB"),
        (f"peak memory of the worker, one file of {found.get('big_gib', '?')} GiB", _largest(big) / MB, 200, "MB"),
        ("one file read, in process", medians["mothball"].get("read_ms", math.nan), 50, "ms"),
        ("ten clones / one", found.get("clones", {}).get("mothball", {}).get("ratio", math.nan), 1.15, "x"),
        ("queue and registry work of a job", fleet.get("overhead_ms", math.nan), 15, "ms"),
        ("import mothball", startup.get("import_ms", math.nan), 150, "ms"),
        ("mothball --help", startup.get("help_ms", math.nan), 400, "ms"),
    ]
    return [
        {"bar": name, "value": value, "limit": limit, "unit": unit, "met": value <= limit}
        if not math.isnan(value)
        else {"bar": name, "value": None, "limit": limit, "unit": unit, "met": None}
        for name, value, limit, unit in rows
    ]


def _largest(values: list[Any]) -> float:
    known = [float(value) for value in values if value is not None]
    return max(known) if known else math.nan


def show(found: dict[str, Any], console: Console) -> None:
    """Print everything."""
    tree, medians = found["tree"], found["medians"]
    names = list(medians)
    title = f"{tree['files']} files, {tree['bytes'] / MB:.0f} MB; medians of {found['rounds']} rounds"
    table = Table("", *names, title=title, caption="in brackets: Mothball's figure as a multiple of that tool's")
    for label, figure, unit, scale in ROWS:
        cells = []
        for name in names:
            value, own = medians[name].get(figure), medians["mothball"].get(figure)
            if value is None:
                cells.append("-")
                continue
            share = f" ({own / value:.2f})" if name != "mothball" and own is not None and value else ""
            cells.append(f"{value / scale:.2f} {unit}{share}")
        table.add_row(label, *cells)
    console.print(table)
    process = medians["mothball"]
    console.print(
        "Mothball's seconds are those of the call in a running process, as in a worker; with the start of Python: "
        f"first {process['first_process_seconds']:.2f} s, unchanged {process['unchanged_process_seconds']:.2f} s, "
        f"1 % changed {process['changed_process_seconds']:.2f} s. "
        f"Its stat index (may be deleted): {process['first_cache_bytes'] / MB:.1f} MB. "
        "tar has no increments: its unchanged and changed runs write everything again. "
        "Reading one file is a whole command for the other tools, a call in a running process for Mothball."
    )
    extra = Table("", *names, title="more")
    if clones := found.get("clones"):
        extra.add_row("ten clones / one", *(f"{clones[name]['ratio']:.3f} x" if name in clones else "-" for name in names))
    if big := found.get("big"):
        label = f"one file of {found['big_gib']} GiB: time, peak"
        extra.add_row(label, *(f"{big[n]['seconds']:.1f} s, {big[n]['peak'] / MB:.0f} MB" if n in big else "-" for n in names))
    if extra.row_count:
        console.print(extra)
    if fleet := found.get("fleet"):
        peaks = (("idle_peak", "idle"), ("tree_peak", "on this tree"), ("big_peak", "on the large file"))
        shown = ", ".join(f"{fleet[key] / MB:.0f} MB {what}" for key, what in peaks if key in fleet)
        console.print(
            f"Through the fleet: a job adds {fleet['overhead_ms']:.1f} ms (the caller of wait() sees {fleet['wait_ms']:.1f} ms); "
            f"peak of the worker's largest process: {shown}"
        )
    show_bars(found, console)


def show_bars(found: dict[str, Any], console: Console) -> None:
    """Which bars were met, and who was not there."""
    verdicts = Table("bar", "measured", "limit", "", title="bars")
    for bar in found["bars"]:
        value = "-" if bar["value"] is None else f"{bar['value']:.2f} {bar['unit']}"
        verdict = {True: "[green]met[/]", False: "[red]missed[/]", None: "not measured"}[bar["met"]]
        verdicts.add_row(bar["bar"], value, f"{bar['limit']} {bar['unit']}", verdict)
    console.print(verdicts)
    for name, why in found["skipped"].items():
        console.print(f"{name} was skipped: {why}")
