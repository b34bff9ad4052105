"""How long a program waits for `import mothball`, and a person for `mothball --help`."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.measure import median, run

RUNS = 9
_TIMED = "import sys, time; begin = time.perf_counter(); {code}; sys.stdout.write(str(time.perf_counter() - begin))"


def measure() -> dict[str, float]:
    """Medians in milliseconds: two imports inside a running interpreter, and the whole command with its interpreter."""
    out = {
        "import_ms": _inside("import mothball"),
        "import_fleet_ms": _inside("from mothball import Fleet"),
        "python_ms": median(run([sys.executable, "-c", "pass"]).seconds * 1000 for _ in range(RUNS)),
    }
    command = Path(sys.executable).with_name("mothball")
    program = [str(command)] if command.is_file() else [sys.executable, "-m", "workers.main"]
    out["help_ms"] = median(run([*program, "--help"]).seconds * 1000 for _ in range(RUNS))
    return out


def _inside(code: str) -> float:
    command = [sys.executable, "-c", _TIMED.format(code=code)]
    run(command)  # compile once
    return median(float(run(command).output) * 1000 for _ in range(RUNS))
