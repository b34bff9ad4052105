"""A process that ends a container when whoever started the container is killed: nothing of ours runs then that could.

It is a shell that waits for a line on a pipe. The pipe closes when its writer dies, however that happens.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_WORD: Final = b"over\n"
# More than once: runc may be just about to make the container when its caller is killed. Not when the next run has removed the
# folder: runc would make it again.
_WATCH: Final = (
    'read -r word; [ "$word" = over ] && exit; '
    'for pause in 0 1 2 5; do sleep $pause; [ -d "$1" ] || exit; "$0" --root "$1" delete --force "$2"; done'
)
_END_SECONDS: Final = 5.0


@contextmanager
def guarded(runc: str, state: Path, container: str, environment: dict[str, str]) -> Iterator[None]:
    """While the block lasts, the death of this process ends the container `container` of runc's folder `state` within seconds.

    Its folder of state goes too; what else the run left is removed by the next one. Without a shell there is no guardian.
    """
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, runc, str(state), container], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd="/", env=environment, start_new_session=True,
        )  # fmt: skip
    except OSError:
        yield
        return
    try:
        yield
    finally:
        assert process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(OSError):
            process.stdin.write(_WORD)
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
