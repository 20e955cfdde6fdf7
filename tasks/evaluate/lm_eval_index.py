"""Which lm-evaluation-harness tasks there are, where they are defined, and what decides their results.

Reading the 14,000 definitions that lm-evaluation-harness brings takes it 11 s; their names and places are kept in the store.
"""

import difflib
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError
from configs.schema import Evaluate
from tasks.download.text import dataset_commit
from tasks.evaluate.lm_eval_adapter import read_index
from tasks.runtime.child_process import isolated
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.store.digests import sha256_file, sha256_files

STAGE = 2


class Definition(BaseModel):
    """A task, group or tag: the folder that defines it, what it consists of, or where its data is."""

    model_config = ConfigDict(frozen=True)

    folder: str
    """The folder to hand to lm-evaluation-harness."""
    children: list[str] = []
    dataset: str | None = None
    revision: str | None = None
    files: list[str] = []
    """Local files or folders that hold its data."""


class TaskWork(BaseModel):
    """Which tasks to run, and the folders that define them."""

    model_config = ConfigDict(frozen=True)

    names: list[str]
    include: list[str]


def check_tasks(tasks: list[str], task_path: str | None) -> None:
    """Check that every task exists.

    Raises:
        BadInputError: an unknown task, with the nearest names, or a task_path that is not a folder with tasks.
    """
    find_tasks(tasks, task_path)


def find_tasks(tasks: list[str], task_path: str | None) -> dict[str, Definition]:
    """The definitions of `tasks` and of all that they consist of, by name. Tasks of one's own come first.

    Raises:
        BadInputError: as `check_tasks`.
    """
    if not tasks:
        return {}
    definitions: dict[str, Definition] = {}
    if task_path is not None:
        folder = Path(task_path).expanduser().absolute()
        if not folder.is_dir():
            raise BadInputError(
                f"evaluate.task_path {task_path}: not a folder; give one with lm-evaluation-harness YAML files"
            )
        definitions = _index(folder, {"files": _digests(folder)})
    if not _closed(tasks, definitions):
        definitions = {**_index(None, {"lm_eval": version("lm_eval")}), **definitions}
    for name in tasks:
        if name not in definitions:
            near = difflib.get_close_matches(name, definitions, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; see lm_eval's list of tasks"
            raise BadInputError(f"evaluate.tasks {name}: lm-evaluation-harness has no such task{hint}")
    return {name: definitions[name] for name in _all(tasks, definitions) if name in definitions}


def work_of(tasks: list[str], found: dict[str, Definition]) -> TaskWork:
    """What a process needs to run `tasks`."""
    return TaskWork(names=tasks, include=sorted({found[name].folder for name in _all(tasks, found) if name in found}))


def inputs_of(spec: Evaluate, found: dict[str, Definition]) -> dict[str, dict[str, Any]]:
    """What decides each task's results besides the model: definitions, data, limits, versions.

    Raises:
        TameError: the data of a task cannot be reached.
    """
    own = {} if spec.task_path is None else _digests(Path(spec.task_path).expanduser().absolute())
    common = {
        "limit": spec.task_limit,
        "fewshot": spec.task_fewshot,
        "batch_size": spec.batch_size,
        **({"new_tokens": spec.task_new_tokens} if spec.task_new_tokens else {}),
        "definitions": own,
        "lm_eval": version("lm_eval"),
        "datasets": version("datasets"),
    }
    commits: dict[tuple[str, str], str] = {}
    data = {name: _data(name, definition, commits) for name, definition in found.items()}
    return {
        task: {"task": task, "data": {name: data[name] for name in _all([task], found) if data[name]}, **common}
        for task in spec.tasks
    }


def _data(name: str, definition: Definition, commits: dict[tuple[str, str], str]) -> list[str]:
    """What identifies the data of the task `name`: digests of its files, the commit of its data set."""
    try:
        # without their paths, which differ between machines
        found = [on_disk.digest_of(_digests(f)) if f.is_dir() else sha256_file(f) for f in map(Path, definition.files)]
        if definition.dataset:
            asked = (definition.dataset, definition.revision or "main")
            commits[asked] = commits.get(asked) or dataset_commit(*asked)
            found += [definition.dataset, commits[asked]]
    except OSError as error:
        raise BadInputError(
            f"evaluate.tasks {name}: its data {error.filename}: {error.strerror}; put it there"
        ) from None
    except TameError as error:
        raise type(error)(f"evaluate.tasks {name}: {error}") from None
    return found


def _closed(tasks: list[str], definitions: dict[str, Definition]) -> bool:
    return set(_all(tasks, definitions)) <= definitions.keys()


def _all(tasks: list[str], definitions: dict[str, Definition]) -> list[str]:
    seen: list[str] = []
    waiting = list(tasks)
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.append(name)
            waiting += definitions[name].children if name in definitions else []
    return sorted(seen)


def _digests(folder: Path) -> dict[str, str]:
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    return sha256_files(folder, names)


def _index(folder: Path | None, inputs: dict[str, Any]) -> dict[str, Definition]:
    where = {} if folder is None else {"folder": str(folder)}

    def make(target: Path) -> on_disk.Made:
        what = "task definitions"
        (target / "index.json").write_text(
            json.dumps(isolated(what, read_index, None if folder is None else str(folder)))
        )
        return on_disk.Made()

    artifact, _ = store.build("tasks-index", {**inputs, **where, "stage": STAGE}, make, shared=False)
    content = json.loads((Path(artifact.path) / "index.json").read_bytes())
    base = str(folder) if folder else str(Path(str(find_spec("lm_eval").origin)).parent / "tasks")  # type: ignore[union-attr]
    return {
        name: Definition.model_validate({**entry, "folder": str(Path(base) / entry["folder"])})
        for name, entry in content.items()
    }
