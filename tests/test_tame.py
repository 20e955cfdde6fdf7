"""The command line: help, exit codes, one line for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tame(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "tame", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, tame\ntry: tame.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'prefect', 'mlflow', 'pydantic', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("run", "plan", "quantize", "evaluate", "publish", "up", "cache"):
        assert f"  {command} " in done.stdout


def test_a_bad_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("nam: x")
    program = (
        "import sys, tame\ntry: tame.main(sys.argv[1:])\nexcept SystemExit as e: print(e.code)\n"
        "print([m for m in ('torch', 'prefect', 'mlflow', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, "run", str(tmp_path / "bad.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2", "[]"]
    assert "nam is not a key of a recipe; did you mean name?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: No such file"),
        (["run", "configs/demo.yaml", "--set", "gate.max_mean_kl=.nan"], "gate.max_mean_kl is nan"),
        (["run", "configs/demo.yaml", "--set", "source.model=/nothing/here"], "/nothing/here: no such folder or file"),
        (["quantize", "/nothing/here", "out", "--method", "nf4"], "/nothing/here: no such folder"),
        (["quantize", "x", "out", "--method", "int8", "--double-quant"], "double_quant belongs to the 4-bit methods"),
        (["publish"], "expected FOLDER REPO"),
        (["nonsense"], "invalid choice"),
        (["quantize", "x"], "required"),
        (["run", "configs/demo.yaml", "--no-such-option"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_with_exit_code_2(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, output, errors = tame(*arguments, TAME_HOME=str(tmp_path / "home"))
    assert code == 2
    assert said in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert output == ""
    assert not (tmp_path / "home" / "artifacts").exists()


def test_the_cache_is_listed_verified_and_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAME_HOME", str(tmp_path))
    from tasks.store import artifacts as store
    from tasks.store import on_disk

    def make(folder: Path) -> on_disk.Made:
        (folder / "a.txt").write_text("content")
        return on_disk.Made()

    artifact, _ = store.build("kind", {}, make)
    assert tame("cache", "list")[1].split()[:2] == ["kind", artifact.key[:12]]
    assert tame("cache", "verify")[0] == 0
    Path(artifact.path, "a.txt").write_text("changed")
    code, output, _ = tame("cache", "verify")
    assert code == 1
    assert "a.txt" in output
    assert tame("cache", "prune")[1].startswith("removed 1 artifacts")
    assert tame("cache", "list") == (0, "", "")
