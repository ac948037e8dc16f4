"""Running a program that a model wrote: apart, without network, within limits, and only if asked.

The program runs in new user, network, mount and process namespaces (`unshare` of util-linux), sees
every file system read-only but for an empty temporary folder, and has limits on processor time,
memory, file size and processes; whatever it started is killed with it. Where the platform cannot do
that, which is tried out first, it is refused.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY = 2 << 30  # bytes of address space
FILE = 1 << 20  # bytes that a file may grow to
PROCESSES = 64
NOBODY = 65534
_ISOLATE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child")
_MAPPED = ("--user", "--map-root-user")  # root needs no user namespace, and becomes nobody instead
_DROPPED = (
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs",
    "--bounding-set=-all", "--inh-caps=-all",
)  # fmt: skip
_READ_ONLY = """
mount --make-rprivate / && mount --bind "$PWD" "$PWD" && cd "$PWD" || exit 97
mkdir python && mount --bind "$PYTHON" python || exit 98
while read -r _ place _ flags _; do
  [ "$place" = "$PWD" ] || mount -o "remount,bind,ro,${flags#r?,}" "$place" 2>/dev/null
done < /proc/self/mounts
exec "$@"
"""


class SandboxError(RuntimeError):
    """This platform cannot isolate a program."""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a Python program ends without an error within its limits.

    Raises:
        SandboxError: the platform cannot isolate it; nothing was run.
    """
    require()
    return _status(program, seconds) == 0


@functools.cache
def require() -> None:
    """Try out once whether a program can be isolated here.

    Raises:
        SandboxError: with what is missing.
    """
    advice = "leave the code tasks out, or run them where Linux namespaces can be made"
    if sys.platform != "linux" or any(shutil.which(n) is None for n in ("unshare", "mount")):
        raise SandboxError(f"generated code needs `unshare` and `mount` of util-linux; {advice}")
    if _status("pass", SECONDS) != 0:
        raise SandboxError(f"generated code cannot be isolated here (`unshare` fails); {advice}")
    for what, attempt in _escapes().items():
        if _status(attempt, SECONDS) == 0:
            raise SandboxError(f"generated code cannot be isolated here: {what}; {advice}")


def _escapes() -> dict[str, str]:
    """What no program may be able to do -> a program that ends well if it can."""
    lines = [
        "import os, tempfile",
        "def can(place):",
        "    try: os.close(tempfile.mkstemp(dir=place)[0])",
        "    except OSError: return False",
        "    return True",
        f"assert any(can(p) for p in {[str(Path.home()), str(Path.cwd()), '/tmp', '/var/tmp']!r})",  # noqa: S108
    ]
    return {
        "the network is within reach": "import socket; print(socket.if_nameindex()[1])",
        "files can be written": "\n".join(lines),
    }


def _status(program: str, seconds: float) -> int:
    """Exit status, or -1 where the time ran out; the whole process group is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="prunescope-") as folder:
        file = Path(folder) / "program.py"
        file.write_text(program, "utf-8", errors="replace")
        if root := os.geteuid() == 0:  # whose processes no limit counts
            os.chown(folder, NOBODY, NOBODY)
        apart = _ISOLATE if root else (*_ISOLATE, *_MAPPED)
        binary = Path(sys.executable).resolve().relative_to(sys.base_prefix)
        python = [f"{folder}/python/{binary}", "-I", "-S", str(file)]
        process = subprocess.Popen(  # noqa: S603
            [*apart, "sh", "-c", _READ_ONLY, "sh", *(_DROPPED if root else ()), *python],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
            env={"PATH": f"{os.defpath}:/usr/sbin:/sbin", "TMPDIR": folder, "PYTHON": sys.base_prefix},
            preexec_fn=functools.partial(_limit, int(seconds)),
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _limit(seconds: int) -> None:
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))
