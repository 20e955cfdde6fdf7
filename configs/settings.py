"""Every TAME_* variable of the environment: what it is for, what holds without it, and its value.

A variable is read when it is asked for, because a worker sets some of them for the processes that it starts. The table in
docs/operate.md is `table()`; a test compares them.
"""

import difflib
import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from configs.errors import BadInputError


class Setting(NamedTuple):
    """A variable that tame reads: its name, what holds where it is not set, and what it means."""

    name: str
    default: str
    meaning: str


HOME = Setting(
    "TAME_HOME",
    "~/.cache/tame",
    "the folder of this machine's state: artifacts, runs, MLflow's embedded database, logs",
)
STORE = Setting(
    "TAME_STORE",
    "none",
    "the artifact store that machines share: s3://bucket/prefix, gs://bucket/prefix, file:///path or a path",
)
STORE_PATIENCE = Setting(
    "TAME_STORE_PATIENCE", "150", "seconds that the shared store is waited for while it does not answer"
)
LEASE_SECONDS = Setting(
    "TAME_LEASE_SECONDS",
    "90",
    "seconds without a sign of life after which a machine that builds a shared artifact counts as dead; "
    "give all machines the same number",
)
SIGNING_KEY = Setting(
    "TAME_SIGNING_KEY", "none", "a PEM file with a private elliptic-curve key; what is published is signed with it"
)
SIGNING_PUBLIC_KEY = Setting(
    "TAME_SIGNING_PUBLIC_KEY",
    "none",
    "a PEM file with the public key; `tame publish --check` verifies signatures with it",
)
APPROVAL_HOURS = Setting(
    "TAME_APPROVAL_HOURS",
    "168",
    "hours that a run with publish.approve waits for an answer, which is then a no; give `tame provision` and workers the same",
)
VLLM = Setting(
    "TAME_VLLM",
    "TAME_HOME/runtimes/vllm/bin/python",
    "the Python of an environment with vLLM, for `tame serve-check` and recipes with serve: [vllm]; `make vllm` makes one",
)
TRANSFORMERS = Setting(
    "TAME_TRANSFORMERS",
    "tame's own",
    "the Python of an environment with transformers, for `tame serve-check --runtime transformers` and serve: [transformers]",
)
PEFT = Setting(
    "TAME_PEFT",
    "tame's own",
    "the Python of an environment with PEFT, for `tame serve-check --runtime peft` and serve: [peft]; `pip install peft==0.21.2`",
)
DEVICE_LIMIT = Setting(
    "TAME_DEVICE_LIMIT",
    "none",
    "set by `tame worker` for the runs that it starts: the limit on Prefect's server that stands for the worker's device",
)
UP = Setting(
    "TAME_UP",
    "none",
    "set by `tame up` for the processes that it starts, which are known by it when they are to be ended",
)
SETTINGS = (
    HOME,
    STORE,
    STORE_PATIENCE,
    LEASE_SECONDS,
    SIGNING_KEY,
    SIGNING_PUBLIC_KEY,
    APPROVAL_HOURS,
    VLLM,
    TRANSFORMERS,
    PEFT,
    DEVICE_LIMIT,
    UP,
)
OF_SCRIPTS = (
    "TAME_DATABASE_PASSWORD",
    "TAME_ENV",
    "TAME_HOST",
    "TAME_LISTEN",
    "TAME_PREFECT_AUTH",
    "TAME_S3_SECRET",
    "TAME_TORCH_INDEX",
    "TAME_VENV",
)
"""Variables of infra/compose.yaml and infra/slurm, which tame itself does not read."""


def home() -> Path:
    """The folder of TAME_HOME, absolute.

    Raises:
        BadInputError: its path holds a question mark.
    """
    folder = Path(os.environ.get(HOME.name) or HOME.default).expanduser().absolute()
    if "?" in str(folder):  # SQLAlchemy takes what follows for the parameters of MLflow's database
        raise BadInputError(
            f"{HOME.name} is {str(folder)!r}: expected a folder whose path has no question mark, which the address "
            "of a database cannot hold"
        )
    return folder


def shared_store() -> str:
    """The address in TAME_STORE, or an empty text: artifacts stay on this machine."""
    return os.environ.get(STORE.name, "").strip()


def store_patience() -> float:
    """TAME_STORE_PATIENCE in seconds.

    Raises:
        BadInputError: the value is not a number of seconds above 0.
    """
    return _seconds(STORE_PATIENCE)


def lease_seconds() -> float:
    """TAME_LEASE_SECONDS.

    Raises:
        BadInputError: the value is not a number of seconds above 0.
    """
    return _seconds(LEASE_SECONDS)


def approval_time() -> timedelta:
    """TAME_APPROVAL_HOURS in whole seconds, as Prefect's automations count.

    Raises:
        BadInputError: the value is not a number of hours above 0.
    """
    return timedelta(seconds=int(3600 * _seconds(APPROVAL_HOURS, "hours")))


def runtime_python(name: str) -> tuple[str, Path]:
    """The variable that names the Python of the runtime `name`, a key of RUNTIMES in tasks/serve, and that Python."""
    setting = {"vllm": VLLM, "transformers": TRANSFORMERS, "peft": PEFT}[name]
    own = home() / "runtimes" / "vllm" / "bin" / "python" if setting is VLLM else Path(sys.executable)
    return setting.name, Path(os.environ.get(setting.name) or own).expanduser().absolute()


def device_limit() -> str | None:
    """The name in TAME_DEVICE_LIMIT; None outside of a worker that has a device."""
    return os.environ.get(DEVICE_LIMIT.name) or None


def file_of(setting: Setting) -> Path | None:
    """The file that `setting` names, or None where it is not set.

    Raises:
        BadInputError: the file does not exist.
    """
    given = os.environ.get(setting.name)
    if not given:
        return None
    file = Path(given).expanduser()
    if not file.is_file():
        raise BadInputError(
            f"{setting.name}: there is no file {file}; give the path of {setting.meaning.split(';')[0]}"
        )
    return file


def unknown(environment: Mapping[str, str]) -> list[str]:
    """A warning for each TAME_* variable in `environment` that nothing reads, with the nearest name that is read."""
    names = [setting.name for setting in SETTINGS]
    warnings = []
    for name in sorted(environment):
        if name.startswith("TAME_") and name not in names and name not in OF_SCRIPTS:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
            warnings.append(f"{name} is set, but tame reads no such variable; {hint}")
    return warnings


def table() -> str:
    """Every variable as a Markdown table: what the documentation shows."""
    rows = [f"| `{one.name}` | {one.default} | {one.meaning} |" for one in SETTINGS]
    return "\n".join(["| variable | without it | means |", "| --- | --- | --- |", *rows])


def _seconds(setting: Setting, unit: str = "seconds") -> float:
    given = os.environ.get(setting.name) or setting.default
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise BadInputError(
            f"{setting.name} is {given!r}: expected a number of {unit} above 0, such as {setting.default}"
        )
    return seconds
