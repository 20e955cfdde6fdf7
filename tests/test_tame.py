"""The command line: help, exit codes, one line for every error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import load_recipe
from configs.schema import Recipe

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
    listed = tame("cache", "list")[1]
    assert listed.split()[0] == "kind"
    assert artifact.key[:12] in listed
    assert "1 artifacts, 0.0 MB in " in listed
    dry = tame("cache", "prune", "--older-than", "0", "--dry-run")[1]
    assert "would remove 1 artifacts" in dry
    assert Path(artifact.path).exists()
    assert tame("cache", "verify")[0] == 0
    Path(artifact.path, "a.txt").write_text("changed")
    code, output, _ = tame("cache", "verify")
    assert code == 1
    assert "a.txt" in output
    assert tame("cache", "prune")[1].startswith("removed 1 artifacts")
    assert tame("cache", "list") == (0, "", "")


def test_alone_it_says_what_to_type_next() -> None:
    code, output, errors = tame()
    assert (code, errors) == (0, "")
    assert "tame run Qwen/Qwen3-0.6B --to nf4" in output
    assert tame("--version")[1].startswith("tame 0")


def test_the_nearest_command_and_format_are_named(tiny_llama: Path) -> None:
    code, _, errors = tame("rnu")
    assert code == 2
    assert errors.endswith("did you mean run?\n")
    code, _, errors = tame("run", tiny_llama, "--to", "nf5")
    assert (code, errors) == (2, "tame: --to nf5: there is no such format; did you mean nf4?\n")


def test_a_recipe_from_flags_is_the_one_that_it_shows(tiny_llama: Path, tmp_path: Path) -> None:
    asked = [tiny_llama, "--to", "nf4,w4a16-g64", "--calibrate", "fast", "--limit", "0.3", "--publish", "me"]
    code, shown, errors = tame("run", *asked, "--set", "evaluate.window=64", "--show-recipe", TAME_HOME=str(tmp_path))
    assert code == 0, errors
    recipe = Recipe.model_validate(yaml.safe_load(shown))
    assert [variant.label for variant in recipe.variants] == ["nf4-cal-fast", "w4a16-g64-cal-fast"]
    assert (recipe.evaluate.window, recipe.gate.max_mean_kl) == (64, 0.3)
    assert (recipe.publish.to, recipe.publish.repo, recipe.publish.private) == ("hub", "me/{model}-{variant}", True)
    file = tmp_path / "shown.yaml"
    file.write_text(shown)
    assert load_recipe(file) == recipe
    code, _, errors = tame("run", file, "--to", "nf4")
    assert (code, "--to: belongs to a MODEL" in errors) == (2, True)
    code, _, errors = tame("run", tmp_path / "nothing", "--to", "nf4")
    assert (code, "nothing: there is no such file or folder; give a recipe" in errors) == (2, True)


def test_init_writes_a_recipe_that_suits_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    assert tame("init", tiny_llama, "-o", file, TAME_HOME=str(tmp_path))[0] == 0
    recipe = load_recipe(file)
    assert recipe.source.model == str(tiny_llama)
    assert [variant.label for variant in recipe.variants] == ["nf4-cal", "int8"]
    assert recipe.gate.max_mean_kl
    assert "# Made for this machine" in file.read_text()
    code, _, errors = tame("init", tiny_llama, "-o", file)
    assert (code, "is there already" in errors) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    pytest.importorskip("shtab")
    code, script, _ = tame("completion", shell)
    assert code == 0
    assert "--show-recipe" in script or "show-recipe" in script
