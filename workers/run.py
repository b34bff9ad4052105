"""``python -m workers.run worker|beat|flower``: become that process, with the settings of the environment.

One entry for containers and service managers. The program is replaced, not started as a child, so signals reach it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from mothball.errors import ConfigError
from mothball.settings import Settings
from workers.config import Command, beat_command, clean_temp, flower_command, worker_command

COMMANDS: dict[str, Callable[[Settings], Command]] = {
    "worker": worker_command,
    "beat": beat_command,
    "flower": flower_command,
}
USAGE = 2


def main(argv: list[str]) -> None:
    """Replace this process by the one of the role in `argv`; `SystemExit` 2 for a wrong role, 78 for wrong settings."""
    if len(argv) != 1 or argv[0] not in COMMANDS:
        sys.stderr.write(f"usage: python -m workers.run {'|'.join(COMMANDS)}\n")
        raise SystemExit(USAGE)
    try:
        settings = Settings.load()
    except ConfigError as error:
        sys.stderr.write(f"{error.message}\n")
        raise SystemExit(error.exit_code) from None
    settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    clean_temp(settings)
    command = COMMANDS[argv[0]](settings)
    os.execve(command.argv[0], command.argv, command.env)  # noqa: S606 - our own interpreter and arguments


if __name__ == "__main__":
    main(sys.argv[1:])
