"""A release from a Hub to a Hub, by the command line alone: published once, as measured, and shown to nobody before."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import Hub
from tests.test_flow import ROOT, TEXT

pytestmark = pytest.mark.e2e

BASE_CARD = "---\nlicense: mit\nlanguage: [en]\n---\n# Base\n\nIt wins every benchmark.\n"
VARIANTS = ("int8", "nf4")


class Release:
    """A recipe that goes from `hub` to `hub`, run by `tame run`."""

    def __init__(self, hub: Hub, folder: Path, prefect_url: str) -> None:
        self.hub, self.folder = hub, folder
        self.environment = {
            **os.environ,
            "TAME_HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token(),
            "PREFECT_API_URL": prefect_url,
            "OMP_NUM_THREADS": "1",
        }
        (folder / "text.txt").write_text(TEXT)

    def run(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        self.hub.requests.clear()
        command = [sys.executable, "-m", "tame", *arguments]
        environment = {**self.environment, **environment}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def release(self, limit: float = 5.0, repo: str = "me/{model}-{variant}", **environment: str) -> int:
        recipe: dict[str, Any] = {
            "name": "tiny",
            "source": {"model": "org/tiny"},
            "variants": [{"method": name} for name in VARIANTS],
            "evaluate": {"text": {"files": [str(self.folder / "text.txt")]}, "window": 64, "max_tokens": 512},
            "gate": {"max_mean_kl": limit},
            "publish": {"to": "hub", "repo": repo, "private": False},
        }
        recipe["evaluate"] |= {"speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1}, "samples": None}
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        run = self.run("run", str(path), "--out", str(self.folder / "out"), **environment)
        self.told = run.stdout + run.stderr
        return run.returncode

    @property
    def writes(self) -> list[str]:
        """Requests of the last run that change something."""
        reading = ("GET", "HEAD", "POST /api/validate-yaml")
        return [request for request in self.hub.requests if not request.startswith(reading)]


def digests(hub: Hub) -> dict[tuple[str, str], str]:
    return {(r.id, path): file.sha256 for r in hub.repos.values() for path, file in r.files().items()}


def test_from_a_hub_to_a_hub(tiny_llama: Path, tmp_path: Path, prefect_url: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny_llama.iterdir():
        (source / path.name).symlink_to(path)
    (source / "README.md").write_text(BASE_CARD)
    with Hub() as hub:
        hub.add_model("org/tiny", source)
        tame = Release(hub, tmp_path, prefect_url)

        assert tame.release() == 0, tame.told
        result = json.loads((tmp_path / "out" / "result.json").read_bytes())
        for variant in result["variants"]:
            name = f"me/tiny-{variant['name']}"
            remote = {path: file.sha256 for path, file in hub.model(name).files().items()}
            assert variant["artifact"]["files"].items() <= remote.items()
            assert variant["published"] == f"{hub.url}/{name}/commit/{hub.model(name).at('main')}"
            assert not hub.model(name).private
            card = hub.read(name, "README.md").decode()
            assert "license: mit" in card
            assert "every benchmark" not in card
            assert tame.run("publish", "--check", name, "--source", "org/tiny").returncode == 0
            program = card.split("```python\n")[1].split("```")[0]
            stranger = {**tame.environment, "HF_HOME": str(tmp_path / "stranger"), "HF_TOKEN": ""}
            run = subprocess.run([sys.executable, "-c", program], env=stranger, capture_output=True, check=False)
            assert run.stdout.startswith(b"The capital of France is"), run.stderr

        assert tame.release() == 0, tame.told
        assert tame.writes == []
        before = digests(hub)
        assert tame.release(limit=6.0) == 0, tame.told
        changed = {place for place, digest in digests(hub).items() if before[place] != digest}
        assert changed == {(f"me/tiny-{name}", path) for name in VARIANTS for path in ("README.md", "tame.json")}
        assert not [request for request in tame.writes if "/lfs" in request]

        assert tame.release(limit=0.0, repo="me/rejected-{variant}") == 3, tame.told
        assert tame.writes == []
        assert tame.release(HF_TOKEN=hub.token("read")) == 2
        assert "HF_TOKEN" in tame.told
        assert len(hub.requests) < 5

        token = hub.token().encode()
        written = [path for path in (tmp_path, Path(os.environ["PREFECT_HOME"])) for path in path.rglob("*")]
        assert not [path for path in written if path.is_file() and token in path.read_bytes()]
        published = [file for repo in hub.repos.values() for file in repo.files().values()]
        assert not [file for file in published if token in file.place.read_bytes()]
