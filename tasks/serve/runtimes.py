"""The programs that people open models with, each in a Python environment of its own, and how one is asked.

A runtime wants other versions of torch and transformers than tame does, so it never shares tame's environment. What runs in
it knows nothing of tame: probe.py reads a request, and writes an answer, both JSON.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import BadInputError, TameError, line
from configs.settings import runtime_python
from tasks.quantize.methods import libraries
from tasks.runtime.progress import working

LONGEST = 1800
"""Seconds after which a runtime that has not answered is ended."""
NO_MEMORY = re.compile(r"(?i)out ?of ?memory|(free|available|allocate|enough) (\w+ )?memory|kv cache memory|bad_alloc")
"""What runtimes say where others use the memory, or there is too little: it is no fault of the model's."""


class Runtime(NamedTuple):
    """A program that opens models."""

    title: str
    """What people call it."""
    environment: dict[str, str]
    """Variables that it is started with."""
    install: str
    """How to get it, for a person who has not: an order, as the middle of a sentence."""
    trains: bool = False
    """Whether it also trains a LoRA on what it has opened."""


RUNTIMES = {
    "vllm": Runtime(
        title="vLLM",
        environment={
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that what goes wrong is raised where it can be said
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
        install="make the environment with `make vllm`",
    ),
    "transformers": Runtime(
        title="transformers",
        environment={},
        install="make an environment with `python -m venv ENV` and `ENV/bin/pip install transformers accelerate`",
    ),
    "peft": Runtime(
        title="PEFT",
        environment={},
        install="run `pip install peft==0.21.2` in tame's environment",
        trains=True,
    ),
}
_VERSIONS = """
import importlib.metadata, json, sys
found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
print(json.dumps({n: v for n, v in sorted(found.items()) if n in sys.argv[2:] or n.split("-")[0] == sys.argv[1]}))
"""


def python_of(name: str) -> Path:
    """The Python of the runtime `name`.

    Raises:
        BadInputError: there is none.
    """
    variable, path = runtime_python(name)
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise BadInputError(
            f"serve {name}: there is no Python at {path}; {RUNTIMES[name].install}, or let {variable} name the Python of an "
            "environment that you have"
        )
    return path


def versions_of(name: str) -> dict[str, str]:
    """The versions of the packages that decide what the runtime `name` opens, by the packages' names.

    Raises:
        BadInputError: there is no such environment, or the runtime is not installed in it.
    """
    python, variable = python_of(name), runtime_python(name)[0]
    command = [str(python), "-I", "-c", _VERSIONS, name, *libraries(), "torch", "transformers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    try:
        found: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        raise BadInputError(f"serve {name}: {python} does not run ({line(done.stderr) or done.returncode})") from None
    if own_version(name, found) is None:
        raise BadInputError(
            f"serve {name}: {RUNTIMES[name].title} is not installed for {python}; {RUNTIMES[name].install}, or let "
            f"{variable} name the Python of an environment that has it"
        )
    return found


def own_version(name: str, versions: dict[str, str]) -> str | None:
    """The version of the runtime `name` itself, which is packaged as NAME, or for CPUs as NAME-cpu; None if it is not there."""
    return versions.get(name) or versions.get(f"{name}-cpu")


def ask(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of the runtime `name` to `request`: its own words where it cannot open the model.

    Returns:
        What probe.py writes, with {error} in a line also where it crashed before that was whole.

    Raises:
        BadInputError: there is no such environment.
        TameError: what says nothing of the model: it was killed, had no memory, or took longer than LONGEST.
    """
    runtime, python = RUNTIMES[name], python_of(name)
    with tempfile.TemporaryDirectory(prefix=f"tame-{name}-") as scratch, working(f"starting {runtime.title}"):
        asked, answered, said = (Path(scratch) / part for part in ("request.json", "answer.json", "output.txt"))
        asked.write_text(json.dumps(request))
        command: list[str | Path] = [python, "-I", Path(__file__).with_name("probe.py"), name, asked, answered]
        environment = {**os.environ, **runtime.environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with said.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=scratch, env=environment
            )
            try:
                code = process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                raise TameError(f"{runtime.title} has not answered in {LONGEST // 60} minutes") from None
            finally:
                if process.poll() is None:  # an interrupt, too
                    process.kill()
                    process.wait()
        ended = f"{runtime.title} ended without an answer ({_ending(code, said)})"
        answer: dict[str, Any] = json.loads(answered.read_bytes()) if answered.is_file() else {}
        if ("losses" if runtime.trains else "greedy") not in answer:
            answer.setdefault("error", ended)
        if "error" in answer and (code == -signal.SIGKILL or NO_MEMORY.search(answer["error"])):
            raise TameError(f"{runtime.title}: {answer['error']}; free some memory, and run it again")
        return answer


def _ending(code: int, said: Path) -> str:
    """How a process ended, and the last line that it wrote."""
    how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    lines = said.read_text(errors="replace").split("\n")
    last = next((line(text) for text in reversed(lines) if text.strip()), "")
    return f"{how}: {last}" if last else how
