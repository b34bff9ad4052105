"""``python -m benchmarks.redact``: how fast secrets are found and replaced, a core, and that nothing gets past.

Text files of a real tree are held in memory and redacted by one thread (CPU seconds, so that other work on the machine counts
less), then the result is scanned once more as a tar. Beside it: one alternation of the same shapes in Python's ``re``, which only
finds, and detect-secrets where it can be imported (``pip install detect-secrets``). Canaries are planted in some of the files and
none may survive. Results go to a table and to ``bench-out/redact.json``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import random
import re
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import trees
from benchmarks.measure import CommandFailed, median
from benchmarks.session import finish, header
from mothball.redact import Redactor, Rescan, Rules, is_text
from mothball.redact.builtin import RULES, WORDS

ROOT = Path(__file__).resolve().parents[1]
BAR = 100.0
"""Least MB/s of text that one core redacts."""
SLOW_SHARE = 40
"""detect-secrets reads one file of so many: it is three orders of magnitude slower."""
PIECE = 1024 * 1024

Files = list[tuple[str, bytes]]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON; exit code 2 when it cannot be measured, with --check 1 when a bar is missed, else 0."""
    options = _options(argv)
    console = Console(width=max(100, Console().width), highlight=False)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mothball-bench"
    try:
        tree = options.tree.expanduser().resolve() if options.tree else trees.default_tree(cache, console.print)
        files = _texts(tree, options.megabytes * 1_000_000)
        if not files:
            raise CommandFailed(f"{tree} has no text files")
        found = _measure(options, files, console)
    except CommandFailed as error:
        console.print(str(error), markup=False)
        return 2
    found["tree"] = {
        "path": str(tree) if options.tree else "default",
        "files": len(files),
        "bytes": sum(len(data) for _, data in files),
    }
    _show(found, console)
    return finish(found, options, console)


def _texts(tree: Path, size: int) -> Files:
    """Text files below `tree`, chosen at random (always the same ones) until there are `size` bytes."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    random.Random(trees.SEED).shuffle(paths)
    files: Files = []
    for path in paths:
        data = path.read_bytes()
        if is_text(data[:8192]):
            files.append((str(path.relative_to(tree)), data))
            size -= len(data)
        if size <= 0:
            break
    return files


def _planted(files: Files) -> tuple[Files, list[bytes]]:
    """`files` with a canary in every hundredth, and the canaries."""
    canaries = _canaries()
    planted = list(files)
    for number, canary in enumerate(canaries):
        at = (number * 97) % len(planted)
        name, data = planted[at]
        planted[at] = (name, data + b'\nleak("' + canary + b'")\n')
    return planted, canaries


def _canaries() -> list[bytes]:
    source = random.Random(trees.SEED)
    letters = "abcdefghijkmnopqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"

    def some(size: int, of: str = letters) -> str:
        return "".join(source.choice(of) for _ in range(size))

    shapes = (
        *("AK" + "IA" + some(16, "ABCDEFGHIJKLMNOP234567"), "gh" + "p_" + some(36), "gl" + "pat-" + some(20)),
        *("xox" + "b-1234567890-" + some(24), "sk" + "_live_" + some(24), "np" + "m_" + some(36), "AI" + "za" + some(35)),
        *(f"https://u:{some(16)}@example.com/", f'password = \\"{some(14)}'),
    )
    return [shape.replace("\\", "").encode() for shape in shapes]


def _measure(options: argparse.Namespace, files: Files, console: Console) -> dict[str, Any]:
    planted, canaries = _planted(files)
    size = sum(len(data) for _, data in planted)
    rates: dict[str, list[float]] = {"redact": [], "rescan": [], "re, finds only": []}
    alternation = re.compile(_alternation())
    redactor = Redactor(b"b" * 32, Rules.default())
    redactor.text("compiled before the clock starts")
    out: Files = []
    seen: dict[str, int] = {}
    for number in range(options.rounds):
        started = time.process_time()
        out = [(name, redactor.data(data, name.encode())) for name, data in planted]
        rates["redact"].append(size / 1e6 / (time.process_time() - started))
        packed = _tar(out)
        started = time.process_time()
        look = Rescan(Redactor(None, Rules.default()))
        for at in range(0, len(packed), PIECE):
            look.feed(packed[at : at + PIECE])
        look.finish()
        rates["rescan"].append(len(packed) / 1e6 / (time.process_time() - started))
        started = time.process_time()
        hits = [match.span() for _, data in planted for match in alternation.finditer(data)]
        rates["re, finds only"].append(size / 1e6 / (time.process_time() - started))
        seen["re, finds only"] = len(hits)
        console.print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.0f} MB/s" for name, values in rates.items()))
    left = b"\n".join(data for _, data in out)
    survived = sum(_secret(canary) in left for canary in canaries)
    found: dict[str, Any] = {
        **header(), "rates": rates, "canaries": len(canaries), "survived": survived, "found": dict(redactor.counts), "skipped": {},
        "rounds": options.rounds, "hits_of_re": seen["re, finds only"],
    }  # fmt: skip
    _detect_secrets(planted, found)
    rate = median(rates["redact"])
    found["bars"] = [
        {"bar": "redaction of text, one core", "value": rate, "limit": BAR, "unit": "MB/s", "met": rate >= BAR},
        {"bar": "canaries that survive", "value": float(survived), "limit": 0.0, "unit": "", "met": survived == 0},
    ]
    return found


def _secret(canary: bytes) -> bytes:
    return canary.rpartition(b'"')[2].removeprefix(b"https://u:").partition(b"@")[0]


def _alternation() -> bytes:
    """The shapes of all rules for Python's ``re``, and names with a value beside them."""
    shapes = [
        (b"(?i:" + rule.pattern[4:] + b")" if rule.pattern.startswith(b"(?i)") else b"(?:" + rule.pattern + b")").replace(
            rb"\z", rb"\Z"
        )
        for rule in RULES
        if rule.name not in ("password", "secret", "netrc")  # those of whole lines: `re` goes back and forth in them for minutes
    ]
    beside = rb"(?i:" + WORDS + rb")[\w.-]*[\"']?\s*[:=]\s*[\"']?[^\s\"']{6,}"
    return b"|".join([*shapes, rb"://[^\s/:@]*:[^\s/@]+@", rb"-----BEGIN [A-Z ]*PRIVATE KEY", beside])


def _tar(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(f"rootfs/workspace/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _detect_secrets(files: Files, found: dict[str, Any]) -> None:
    if importlib.util.find_spec("detect_secrets") is None:
        found["skipped"]["detect-secrets"] = "not importable (pip install detect-secrets)"
        return
    # Not a dependency of this project: looked for at run time only.
    secrets_of = importlib.import_module("detect_secrets")
    default_settings = importlib.import_module("detect_secrets.settings").default_settings
    sample = files[::SLOW_SHARE]
    with tempfile.TemporaryDirectory(prefix="mothball-redact-") as folder, default_settings():
        paths = []
        for number, (name, data) in enumerate(sample):
            path = Path(folder) / f"{number}{Path(name).suffix}"
            path.write_bytes(data)
            paths.append(str(path))
        secrets = secrets_of.SecretsCollection()
        started = time.process_time()
        for each in paths:
            secrets.scan_file(each)
        seconds = time.process_time() - started
    found["rates"]["detect-secrets, finds only"] = [sum(len(data) for _, data in sample) / 1e6 / seconds]


def _show(found: dict[str, Any], console: Console) -> None:
    tree = found["tree"]
    table = Table(
        "",
        "MB/s of one core",
        title=f"{tree['files']} text files, {tree['bytes'] / 1e6:.0f} MB; medians of {found['rounds']} rounds",
    )
    for name, values in found["rates"].items():
        table.add_row(name, f"{median(values):.1f}")
    console.print(table)
    console.print(f"replaced: {found['found']}; Python's re stopped at {found['hits_of_re']} places")
    for name, why in found["skipped"].items():
        console.print(f"{name} was skipped: {why}")
    for bar in found["bars"]:
        verdict = "[green]met[/]" if bar["met"] else "[red]missed[/]"
        console.print(f"{bar['bar']}: {bar['value']:.0f} {bar['unit']}, limit {bar['limit']:.0f} {bar['unit']}: {verdict}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redact", description="Redaction and rescan of text.")
    parser.add_argument("--tree", type=Path, help="folder with text files (default: the tree of the other benchmarks)")
    parser.add_argument("--megabytes", type=int, default=100, help="how much text is held in memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench-out" / "redact.json")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
