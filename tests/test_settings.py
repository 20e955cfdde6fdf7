"""The variables of tame's own: each is documented, and one that nothing reads is said."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import settings
from configs.errors import BadInputError

ROOT = Path(__file__).parent.parent


def test_every_variable_is_in_the_documentation() -> None:
    assert settings.table() in (ROOT / "docs" / "operate.md").read_text(encoding="utf-8")


def test_every_variable_that_the_code_names_is_a_setting() -> None:
    known = {one.name for one in settings.SETTINGS} | set(settings.OF_SCRIPTS)
    files = [
        ROOT / "tame.py",
        *(path for part in ("configs", "flows", "infra", "tasks") for path in (ROOT / part).rglob("*")),
    ]
    named = {
        name
        for path in files
        if path.is_file() and path.suffix != ".pyc"
        for name in re.findall(r"\bTAME_[A-Z][A-Z0-9_]*\b", path.read_text(encoding="utf-8"))
    }
    assert named == known


def test_only_one_file_reads_them() -> None:
    files = [path for part in ("configs", "flows", "infra", "tasks") for path in (ROOT / part).rglob("*.py")]
    reading = re.compile(r"environ[^\n]*TAME_|getenv[^\n]*TAME_")
    assert [str(path) for path in files if reading.search(path.read_text(encoding="utf-8"))] == []


def test_a_variable_that_nothing_reads_is_said_with_the_nearest_that_is() -> None:
    assert settings.unknown({"TAME_STOR": "x", "TAME_HOME": "/x", "TAME_VENV": "x", "PATH": "/bin"}) == [
        "TAME_STOR is set, but tame reads no such variable; did you mean TAME_STORE?"
    ]
    command = [sys.executable, "-m", "tame", "cache", "list"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TAME_PATIENCE_OF_STORE": "9"}, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr.count("TAME_PATIENCE_OF_STORE is set, but tame reads no such variable") == 1


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_seconds_that_are_none_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAME_LEASE_SECONDS", value)
    with pytest.raises(BadInputError, match=f"TAME_LEASE_SECONDS is '{value}': expected a number of seconds above 0"):
        settings.lease_seconds()


def test_what_is_not_set_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in settings.SETTINGS:
        monkeypatch.delenv(one.name, raising=False)
    assert settings.home() == Path("~/.cache/tame").expanduser()
    assert (settings.store_patience(), settings.lease_seconds()) == (150.0, 90.0)
    assert (settings.shared_store(), settings.device_limit(), settings.file_of(settings.SIGNING_KEY)) == (
        "",
        None,
        None,
    )


def test_a_home_that_no_database_can_lie_in_is_refused_before_work(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tame", "plan", "configs/demo.yaml"]
    there = {**os.environ, "TAME_HOME": str(tmp_path / "why?")}
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"TAME_HOME is '{tmp_path / 'why?'}': expected a folder whose path has no question mark" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "why?").exists()
