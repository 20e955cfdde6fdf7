"""Work in a process of its own: what comes back, and what happens when it dies."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import BadInputError, TameError
from tasks.runtime import child_process
from tasks.runtime.child_process import isolated
from tasks.runtime.progress import show


def _double(value: int, *, progress=show) -> tuple[int, int]:
    progress("double", 1, 2)
    logging.getLogger("tame.test").warning("doubling %d", value)
    return 2 * value, os.getpid()


def _refuse() -> None:
    raise BadInputError("no such thing")


class _Odd(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def _unpicklable() -> None:
    raise _Odd(1, 2)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _surroundings(*names: str) -> tuple[bool, list[str | None]]:
    return "torch" in sys.modules, [os.environ.get(name) for name in names]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
def test_libraries_are_there_and_settings_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that libraries read when they are imported is never ignored: they are then imported anew."""
    monkeypatch.setattr(child_process, "_preloaded_under", {})
    monkeypatch.setenv("TAME_TEST", "one")
    assert isolated("look", _surroundings, "TAME_TEST", "TQDM_DISABLE") == (True, ["one", "1"])
    monkeypatch.setenv("TAME_TEST", "two")
    assert isolated("look", _surroundings, "TAME_TEST") == (True, ["two"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert isolated("look", _surroundings, "TAME_TEST", "HF_HUB_OFFLINE") == (False, ["two", "1"])
    assert "TQDM_DISABLE" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")
@pytest.mark.e2e
def test_what_lies_in_the_folder_is_not_taken_for_a_library(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('not this one')")
    look = "'torch' in __import__('sys').modules"
    code = f"from tasks.runtime.child_process import isolated\nprint(isolated('look', eval, {look!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_result_logs_and_process(caplog: pytest.LogCaptureFixture) -> None:
    value, pid = isolated("double it", _double, 21, progress=show)
    assert value == 42
    assert pid != os.getpid()
    assert "doubling 21" in caplog.text


def test_errors_come_back_as_they_are() -> None:
    with pytest.raises(BadInputError, match="no such thing"):
        isolated("refuse", _refuse)
    with pytest.raises(TameError, match="_Odd: 1 and 2"):
        isolated("odd", _unpicklable)


def test_a_killed_process_is_named_with_what_to_do() -> None:
    with pytest.raises(TameError, match=r"evaluate nf4: .*SIGKILL.*memory"):
        isolated("evaluate nf4", _killed)
