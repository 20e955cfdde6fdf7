"""SIGKILL at ten moments spread over a run: the next run finishes the job, with equal numbers, and sweeps up."""

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.test_flow import Place, numbers

pytestmark = pytest.mark.e2e


def left_running(place: Place) -> list[str]:
    """Processes that work in `place`."""
    mine = str(place.folder / "home")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TAME_HOME") == mine:
                found.append(" ".join(process.cmdline())[:120])
        except psutil.Error:
            continue
    return found


def test_killed_at_any_moment_the_next_run_finishes_the_job(tmp_path: Path, tiny_llama: Path, prefect_url: str) -> None:
    variants = [{"method": "int8"}, {"method": "nf4", "double_quant": True}]
    whole = Place(tmp_path / "whole", prefect_url)
    whole.folder.mkdir()
    started = time.monotonic()
    code, reference, output = whole.run(whole.recipe(tiny_llama, variants=variants))
    seconds = time.monotonic() - started
    assert code == 0, output
    for moment in range(1, 11):
        place = Place(tmp_path / f"killed{moment}", prefect_url)
        place.folder.mkdir()
        recipe = place.recipe(tiny_llama, variants=variants)
        process = place.start("run", recipe, "--out", place.folder / "out")
        time.sleep(seconds * moment / 11)
        process.kill()
        process.communicate()
        end = time.monotonic() + 10
        while left_running(place) and time.monotonic() < end:
            time.sleep(0.1)
        assert left_running(place) == []
        code, result, output = place.run(recipe)
        assert code == 0, output
        assert numbers(result) == numbers(reference)
        rubbish = [path.name for path in (place.folder / "home" / "artifacts").iterdir() if path.name.startswith(".")]
        assert rubbish == [".locks"]
        assert [p.name for p in (place.folder / "out").iterdir() if p.name.startswith(".")] == []


def test_a_killed_run_takes_its_own_prefect_server_along(tmp_path: Path, tiny_llama: Path) -> None:
    place = Place(tmp_path, "")
    del place.environment["PREFECT_API_URL"]
    process = place.start("run", place.recipe(tiny_llama), "--out", tmp_path / "out")
    while not any("uvicorn" in command for command in left_running(place)):
        assert process.poll() is None
        time.sleep(0.05)
    while not (tmp_path / "home" / "artifacts").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, 9)
    process.communicate()
    time.sleep(5)
    assert left_running(place) == []


def test_killed_for_memory_while_measured_a_variant_loses_that_part_alone(
    tmp_path: Path, tiny_llama: Path, prefect_url: str
) -> None:
    place = Place(tmp_path, prefect_url)
    recipe = place.recipe(tiny_llama, variants=[{"method": "nf4"}, {"method": "int8"}])
    process = place.start("run", recipe, "--out", tmp_path / "out")
    artifacts = tmp_path / "home" / "artifacts"
    while not (list(artifacts.glob("quantized-*")) and list(artifacts.glob(".partial-scores-*"))):
        assert process.poll() is None
        time.sleep(0.01)
    (server,) = [p for p in psutil.Process(process.pid).children() if "forkserver" in " ".join(p.cmdline())]
    workers = server.children()
    assert len(workers) == 1
    workers[0].kill()
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    nf4, int8 = json.loads((tmp_path / "out" / "result.json").read_text())["variants"]
    assert (nf4["status"], int8["status"]) == ("published", "published")
    lost = int8["metrics"].keys() - nf4["metrics"].keys()
    assert "prefill_tokens_per_second" in lost
    assert not [name for name in lost if "second" not in name and not name.startswith("peak_")]
    assert "evaluate nf4: its process was killed (SIGKILL), most likely for want of memory" in "".join(nf4["notes"])
    assert "Traceback" not in errors
