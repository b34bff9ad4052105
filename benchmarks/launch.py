"""Runs one command and writes its wall time and peak memory as JSON: ``python -I -S launch.py OUT LOG COMMAND...``.

A process of its own, with nothing imported but what it needs: the kernel counts the memory of whoever starts a program
towards that program's peak, so a large parent would be measured instead of a small child.
"""

import os
import sys
import time

out, log, *command = sys.argv[1:]
handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
begin = time.perf_counter()
pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, handle, 2)])
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - begin
unit = 1 if sys.platform == "darwin" else 1024
text = '{"seconds": %r, "peak": %d, "code": %d, "cpu": %r}' % (  # noqa: UP031 - no imports, see above
    seconds,
    usage.ru_maxrss * unit,
    os.waitstatus_to_exitcode(status),
    usage.ru_utime + usage.ru_stime,
)
with open(out, "w") as file:  # noqa: PTH123 - no imports, see above
    file.write(text)
