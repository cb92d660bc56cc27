"""Commands with a time limit, each a process group of its own, of which nothing is left running."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TAG = "SCORESDE_GPU_CHECK"  # in the environment of everything that a part starts
GRACE = 3.0  # seconds between SIGTERM and SIGKILL


class Ended(NamedTuple):
    """How a command ended: its status, negative for a signal, and whether its time was over before."""

    status: int
    late: bool


def run(
    command: Sequence[str],
    seconds: float,
    output: IO[bytes],
    environment: Mapping[str, str] | None = None,
    tag: str | None = None,
    interrupt: signal.Signals = signal.SIGTERM,
    enough: Callable[[], object] = lambda: False,
) -> Ended:
    """Runs a command in the checkout, its output in a file. After ``seconds``, or when ``enough()`` is true, its group
    gets ``interrupt``, and SIGKILL if it is still there a moment later. What it leaves behind is killed in any case:
    its group, and with a ``tag`` also what has left the group."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    added = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(environment or {})
    if tag is not None:
        added[TAG] = tag
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | added, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_hear_interrupts,
    )  # fmt: skip
    try:
        late = not _ends(process, seconds, enough)
        if late:
            _signal(process.pid, interrupt)
            _ends(process, GRACE)
    finally:
        _signal(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a call into a hung driver may not end even now
            process.wait(GRACE)
        if tag is not None:
            kill_tagged(tag)
    return Ended(-signal.SIGKILL if process.returncode is None else process.returncode, late)


class Echo:
    """Prints what comes into a file, each time it is called."""

    def __init__(self, path: Path) -> None:
        self.path, self.told = path, 0

    def __call__(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.told)
            new = file.read()
        self.told += len(new)
        print(new.decode(errors="replace"), end="", flush=True)


def called(
    command: Sequence[str], seconds: float, interrupt: signal.Signals = signal.SIGTERM, **environment: str
) -> tuple[Ended, str]:
    """Runs a command for so long, and prints what it prints as it comes; how it ended, and all that it printed."""
    with tempfile.NamedTemporaryFile() as output:
        echo = Echo(Path(output.name))
        ended = run(command, seconds, output, environment, interrupt=interrupt, enough=echo)
        echo()
        output.seek(0)
        return ended, output.read().decode(errors="replace")


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ends(process: subprocess.Popen[bytes], seconds: float, enough: Callable[[], object] = lambda: False) -> bool:
    end = time.monotonic() + seconds
    while process.poll() is None:
        if enough() or time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def _signal(group: int, number: signal.Signals) -> None:
    # Nobody may be left in it; macOS says so of zombies by the second.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def tagged(tag: str) -> list[int]:
    """The processes whose environment has this tag, whatever group they are in; none where there is no /proc."""
    found, wanted = [], f"{TAG}={tag}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


def kill_tagged(tag: str, but: int | None = None) -> None:
    """Kills the tagged processes, and what they start meanwhile; gives up after a while on those that cannot end."""
    end = time.monotonic() + GRACE
    while (left := [process for process in tagged(tag) if process != but]) and time.monotonic() < end:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
