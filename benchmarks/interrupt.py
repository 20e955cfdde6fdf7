"""How soon Ctrl-C gives the prompt back, at ten moments of a run: `python -m benchmarks.interrupt RECIPE [--home DIR]`.

Every run is in a pseudo-terminal of its own and is interrupted as people do it, by the character that Ctrl-C types. All have
the same TAME_HOME, so that each goes on from what the ones before it have finished; the last one is let be, and must complete.
Said of each: what was on the screen, seconds until the command ended, its exit code and last line, and the processes that were
left 10 seconds later.
"""

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from tests.e2e.test_up import processes_of

ROOT = Path(__file__).parents[1]
MOMENTS: list[float | str] = [
    *(0.1, 0.6, 1.5),
    "starting Prefect's server",
    "dequantize|reading the model",
    r"\d/\d+ baseline",
    r"\d/\d+ baseline.*windows",
    r"\d/\d+ int8",
    r"\d/\d+ nf4",
    "publish",
]
"""Seconds after the start, or what the screen shows; the order is that of a run."""
LEAVES = 10.0
"""Seconds after which nothing may be left."""
DRAWING = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in a pseudo-terminal of 100 columns, and what it has written so far."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.written = ""
        self.process_id, self.screen = pty.fork()
        if self.process_id == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has what it starts in the background ignore it
            os.chdir(ROOT)
            os.execvpe(command[0], command, environment)
        fcntl.ioctl(self.screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))

    def read(self, seconds: float) -> bool:
        """Read for at most `seconds`; False once the terminal is closed."""
        if not select.select([self.screen], [], [], seconds)[0]:
            return True
        try:
            text = os.read(self.screen, 65_536)
        except OSError:  # the last process of the terminal has ended
            return False
        self.written += text.decode(errors="replace")
        return bool(text)

    def until(self, moment: float | str) -> bool:
        """Read until a moment; False if the command ended before it."""
        began = time.monotonic()
        while self.read(0.02):
            if isinstance(moment, str):
                if re.search(moment, self.said):
                    return True
            elif time.monotonic() - began >= moment:
                return True
        return False

    def interrupt(self) -> tuple[float, int]:
        """Press Ctrl-C; the seconds until the command has ended, and its exit code."""
        began = time.monotonic()
        os.write(self.screen, b"\x03")
        while (ended := os.waitpid(self.process_id, os.WNOHANG))[0] == 0:
            self.read(0.01)
        seconds = time.monotonic() - began
        while self.read(0.2) and time.monotonic() - began < seconds + 1:
            continue
        return seconds, os.waitstatus_to_exitcode(ended[1])

    def end(self) -> int:
        """Let it end by itself; its exit code."""
        while self.read(1):
            continue
        return os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])

    @property
    def said(self) -> str:
        """What it has written, without the drawing."""
        return DRAWING.sub("", self.written)

    @property
    def last_line(self) -> str:
        """What stands above the prompt."""
        return re.split(r"[\r\n]+", self.said.strip())[-1]


def main() -> int:
    """Interrupt a run at every moment, then let one complete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--home", type=Path, help="TAME_HOME; a new one, removed at the end, by default")
    options = parser.parse_args()
    home = (options.home or Path(tempfile.mkdtemp(prefix="tame-interrupt-"))).absolute()
    environment = {**os.environ, "TAME_HOME": str(home)}
    command = [sys.executable, "-m", "tame", "run", str(options.recipe.absolute()), "--out", str(home / "out")]
    print("| interrupted at | prompt after, s | exit code | last line | left after 10 s |")
    print("| --- | --- | --- | --- | --- |")
    for moment in MOMENTS:
        terminal = Terminal(command, environment)
        shown = f"{moment} s" if isinstance(moment, float) else f"`{moment}`"
        if not terminal.until(moment):
            print(f"| {shown} | not seen: the run ended | {terminal.end()} | {terminal.last_line} | |", flush=True)
            continue
        seconds, code = terminal.interrupt()
        time.sleep(LEAVES)
        names = [line[:80] for line in processes_of(str(home))]
        print(
            f"| {shown} | {seconds:.2f} | {code} | {terminal.last_line} | {', '.join(names) or 'nothing'} |", flush=True
        )
    began = time.monotonic()
    code = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    print(f"the run that was let be: exit code {code} after {time.monotonic() - began:.0f} s")
    if not options.home:
        shutil.rmtree(home, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
