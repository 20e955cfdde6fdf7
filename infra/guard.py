"""Ends what `tame up` started, once `tame up` itself has ended in whatever way: `python -m infra.guard TOKEN`.

Its standard input closes with `tame up`, be it by Ctrl-C or by SIGKILL. What is to be ended is known by TAME_UP in its
environment, which children inherit: nothing gets away, not even what has lost its parent.
"""

import contextlib
import os
import signal
import sys

import psutil

from configs.settings import UP

PATIENCE = {
    "worker": 4.0,
    "server": 3.0,
}  # seconds, less than ten together; workers first: they tell the server what they leave
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Wait for the end of standard input, then end every process that is marked."""
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    for kind, patience in PATIENCE.items():
        mark = f"{sys.argv[1]} {kind}"
        ended = _marked(mark)
        for process in ended:
            _send(process, signal.SIGTERM)
        psutil.wait_procs(ended, patience)
        while remaining := _marked(mark):
            for process in remaining:
                _send(process, signal.SIGKILL)
            psutil.wait_procs(remaining, 1.0)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(UP.name) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or gone
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


if __name__ == "__main__":
    main()
