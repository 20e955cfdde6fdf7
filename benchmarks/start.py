"""How long somebody waits for tame itself: until something can be read, and until a command ends, in a pseudo-terminal.

    python benchmarks/start.py RECIPE [--home DIR] [--checkout DIR] [--times N]

RECIPE is run once, so that it is cached, unless it was. `--checkout` measures another checkout of tame with the same
Python. Seconds are medians; the CPU's seconds, of the command and the processes that it waited for, tell what a machine that
does other things hides.
"""

import argparse
import os
import pty
import resource
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ENDED = (0, 3)  # a run of which a variant was rejected is a run


class Seen(NamedTuple):
    """Seconds until the first character, until the end, and of the CPU."""

    first: float
    whole: float
    cpu: float


def seen(command: list[str], environment: dict[str, str], folder: Path) -> Seen:
    """Run a command in a terminal of its own."""
    primary, secondary = pty.openpty()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, first = time.monotonic(), None
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
    )
    os.close(secondary)
    while True:
        ready, _, _ = select.select([primary], [], [], 0.02)
        if ready:
            try:
                if not os.read(primary, 65_536):
                    break
            except OSError:  # the last process of the terminal has ended
                break
            first = first or time.monotonic() - began
        elif process.poll() is not None:
            break
    if process.wait() not in ENDED:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    whole = time.monotonic() - began
    os.close(primary)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seen(first or whole, whole, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--home", type=Path, default=Path("/tmp/tame-start"))
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    checkout, home = options.checkout.absolute(), options.home.absolute()
    environment = {**os.environ, "TAME_HOME": str(home), "PREFECT_HOME": str(home / "prefect"), "TERM": "xterm"}
    environment |= {"PYTHONPATH": str(checkout), "COLUMNS": "80"}
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    tame, recipe = [sys.executable, "-m", "tame"], str(options.recipe.absolute())
    ran = [*tame, "run", recipe, "--out", str(home / "out")]
    commands = {"tame": tame, "tame --help": [*tame, "--help"], "tame plan": [*tame, "plan", *ran[len(tame) + 1 :]]}
    commands["tame run, cached"] = ran
    first = subprocess.run(ran, cwd=checkout, env=environment, capture_output=True)
    if first.returncode not in ENDED:
        raise SystemExit(f"{options.recipe}: exit code {first.returncode}: {first.stderr.decode().strip()[-300:]}")
    print(f"load {os.getloadavg()[0]:.1f}, medians of {options.times}\n")
    print("| command | first output, s | whole, s | CPU, s |\n| --- | --- | --- | --- |")
    for name, command in commands.items():
        try:
            found = [seen(command, environment, checkout) for _ in range(options.times)]
        except SystemExit as error:
            print(f"| {name} | {error} | | |")
            continue
        medians = [statistics.median(values) for values in zip(*found, strict=True)]
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in medians)} |", flush=True)


if __name__ == "__main__":
    main()
