"""docs/kaggle.ipynb does what it says: its cells run, with the Hub stand-in and a small model in place of the large one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.schema import Recipe
from tests.hub import Hub

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "kaggle.ipynb"
SMALLER = {
    "variants": [{"method": "nf4", "double_quant": True}],
    "evaluate": {
        "text": {"builtin": "python-docs"}, "window": 64, "max_tokens": 512, "samples": None,
        "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
    },
    "gate": {},
}  # fmt: skip
"""What is asked of a tiny model in the place of what the notebook asks."""


def cells() -> list[str]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    assert all(not cell.get("outputs") for cell in content["cells"])
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, folder: Path, environment: dict[str, str]) -> str:
    """Do in `folder` what IPython does with a cell: files, shell commands, code; what the commands printed."""
    if match := re.match(r"%%writefile (\S+)\n", source):
        recipe = yaml.safe_load(source[match.end() :])
        Recipe.model_validate(recipe)
        (folder / match[1]).write_text(yaml.safe_dump({**recipe, **SMALLER}))
        return ""
    printed = []
    for line in source.splitlines():
        if line.startswith("!tame "):
            command = [sys.executable, "-m", "tame", *line.split()[1:]]
            there = {**environment, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=folder, env=there, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.append(done.stdout)
        elif not line.startswith("!pip install"):
            assert not line.startswith(("!", "%")), line
    code = "\n".join(line for line in source.splitlines() if not line.startswith("!"))
    shown = code.replace("from IPython.display import HTML", "HTML = lambda filename: open(filename).read()")
    here = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(shown, str(NOTEBOOK), "exec"), {})
    finally:
        os.chdir(here)
    return "\n".join(printed)


@pytest.mark.e2e
def test_the_notebook_runs(tiny_llama: Path, tmp_path: Path, prefect_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub() as hub:
        hub.add_model("Qwen/Qwen3-0.6B", tiny_llama)
        there = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TAME_HOME": str(tmp_path / "tame"), "NO_PROXY": "*",
            "PREFECT_API_URL": prefect_url, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
        }  # fmt: skip
        for name, value in there.items():
            monkeypatch.setenv(name, value)
        printed = "\n".join(run_cell(source, tmp_path, dict(os.environ)) for source in cells())
    assert "nf4-dq" in printed
    assert "Qwen/Qwen3-0.6B" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "published" / "Qwen3-0.6B-nf4-dq" / "tame.json").is_file()
