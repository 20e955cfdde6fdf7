"""What a newcomer meets: the same lines on a screen and in a pipe, Ctrl-C, the form for one model."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from configs.method_names import METHODS
from configs.schema import Recipe
from tasks.describe import columns
from tasks.report.terminal import closing
from tests.results import make
from tests.test_flow import ROOT, Place


@pytest.fixture
def place(tmp_path: Path, prefect_url: str) -> Place:
    return Place(tmp_path, prefect_url)


TURNED = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import tame
def plan(options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    except KeyboardInterrupt:
        raise BrokenPipeError from None
tame.plan = plan
tame.main(["plan", "x"])
"""


def test_an_interrupt_that_a_library_makes_another_exception_of_is_one() -> None:
    ended = subprocess.run([sys.executable, "-c", TURNED], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (130, "tame: stopped; the next run goes on from what is finished\n")


@pytest.mark.parametrize("after", [3.0, 8.0])
def test_an_interrupt_gives_the_prompt_back_and_leaves_nothing(place: Place, tiny_llama: Path, after: float) -> None:
    place.environment["TAME_HOME"] += f"-{after}"
    ready = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nimport tame; tame.main()"
    process = place.start("run", place.recipe(tiny_llama), "--out", place.folder / "out", code=("-c", ready))
    time.sleep(after)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # 2 s where nobody else works
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "tame: stopped; the next run goes on from what is finished"
    assert "Traceback" not in errors
    assert not psutil.wait_procs(started, 10)[1]


def test_a_terminal_gets_its_first_line_at_once(tmp_path: Path) -> None:
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "tame", "plan", str(tmp_path / "nothing.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=secondary, stderr=secondary, stdin=secondary)
    os.close(secondary)
    said = b""
    while b"No such file" not in said:
        said += os.read(primary, 4096)
    assert said.startswith(b"Looking at ")
    assert process.wait(60) == 2
    os.close(primary)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_last_table_and_the_plan_fit_the_terminal(width: int, tmp_path: Path) -> None:
    lines = closing(make(), tmp_path, width, False).splitlines()
    table = lines[: lines.index("")]
    assert len(table) > 2
    assert max(map(len, table)) <= width
    assert "verdict" in table[0]
    wide = [("source", "a word and another " * 20), ("nf4", "x" * 20)]
    assert max(map(len, columns(wide, width))) <= width


def test_no_colour_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in closing(make(), tmp_path, 80, True)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as one:
            one.setenv(name, value)
            assert "\x1b[" not in closing(make(), tmp_path, 80, True)


def test_the_form_asks_for_six_things_and_makes_a_recipe(tiny_llama: Path) -> None:
    from prefect.utilities.callables import parameter_schema

    from flows.quantize import quantize, recipe_of

    fields = parameter_schema(quantize).model_dump()["properties"]
    assert list(fields) == ["model", "formats", "calibrate", "most_damage", "publish_to", "private"]
    assert all(field.get("description") for field in fields.values())
    assert fields["formats"]["items"]["enum"] == list(METHODS)  # and no empty one
    assert "minimum" in json.dumps(fields["most_damage"])
    recipe = recipe_of(str(tiny_llama), ["nf4", "int8"], most_damage=0.2, publish_to="me", private=False)
    assert isinstance(recipe, Recipe)
    assert [variant.label for variant in recipe.variants] == ["nf4-cal", "int8"]
    assert (recipe.gate.max_mean_kl, recipe.publish.repo, recipe.publish.private) == (
        0.2,
        "me/{model}-{variant}",
        False,
    )
