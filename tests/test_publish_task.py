"""The publish stage as Prefect runs it, and what it publishes as a stranger loads it."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from configs.schema import Publish
from tasks.runtime.progress import silent
from tasks.store import on_disk
from tasks.store.digests import sha256_files
from tests.hub import Hub

SPEC = Publish(to="hub", repo="me/tiny-nf4", private=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tame_home: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        yield hub


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in nf4, as transformers itself saves it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("quantized")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, str]:
    return sha256_files(folder, sorted(path.name for path in folder.iterdir()))


def test_prefect_tries_again_shows_what_was_there_and_is_told_the_lineage(
    hub: Hub, tmp_path: Path, prefect_url: str
) -> None:
    import httpx
    from prefect import flow
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.stages import publish_task

    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    told = {
        "artifact": {"digest": on_disk.digest_of(files(folder)), "files": files(folder)},
        "source": {"model": "org/base", "commit": "c" * 40, "digest": ""},
        "documents": {},
    }
    extra = {"tame.json": json.dumps(told).encode()}
    hub.fail("POST .*/commit/", 500)

    @flow
    def release() -> Any:
        return publish_task("nf4", folder, files(folder), extra, SPEC.repo, SPEC, return_state=True)

    with temporary_settings({PREFECT_API_URL: prefect_url}):
        first, second = release(), release()
        assert (first.name, second.name) == ("Completed", "Cached")
        assert second.result().commit == first.result().commit == hub.model(SPEC.repo).at("main")
        wanted = {
            "event": {"name": ["prefect.asset.materialization.succeeded"]},
            "resource": {"id": [f"{hub.url}/{SPEC.repo}"]},
        }
        body = {"filter": wanted}
        for _ in range(100):
            found = httpx.post(f"{prefect_url}/events/filter", json=body).json()["events"]
            if found:
                break
            time.sleep(0.1)
    assert [event["resource"]["prefect.resource.id"] for event in found] == [f"{hub.url}/{SPEC.repo}"]
    assert f"{hub.url}/org/base" in [related["prefect.resource.id"] for related in found[0]["related"]]
    assert sum("POST /api/models/me/tiny-nf4/commit" in request for request in hub.requests) == 2


@pytest.mark.e2e
def test_a_stranger_runs_the_cards_program_as_it_stands(hub: Hub, quantized: Path, tmp_path: Path) -> None:
    """Of a model whose repo was given without an owner, and of one that chats."""
    from tasks.publish.task import publish_folder

    chats = Path(shutil.copytree(quantized, tmp_path / "chats"))
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    settings = json.loads((chats / "tokenizer_config.json").read_bytes())
    (chats / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    programs = []
    for folder, repo in ((quantized, "tiny-nf4"), (chats, "tiny-chat-nf4")):
        publish_folder(folder, repo, False, silent)
        remote = {name: file.sha256 for name, file in hub.model(f"me/{repo}").files().items()}
        assert files(folder).items() <= remote.items()
        card = hub.read(f"me/{repo}", "README.md").decode()
        programs.append(card.split("```python\n")[1].split("```")[0])
    assert "messages" not in programs[0]
    assert 'messages = [{"role": "user"' in programs[1]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "stranger"), "HF_TOKEN": "", "OMP_NUM_THREADS": "1"}
    fresh = [sys.executable, "-c", "\n".join(programs)]
    run = subprocess.run(fresh, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.startswith("The capital of France is")
    told, answer = run.stdout.split("\n", 1)
    assert len(told) > len("The capital of France is")
    assert answer.strip()
    assert "What is the capital" not in answer  # which is the question


def test_what_cannot_be_loaded_is_not_shown(hub: Hub, quantized: Path, tmp_path: Path) -> None:
    from configs.errors import TameError
    from tasks.publish.task import publish

    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((quantized / "config.json").read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 63, "num_attention_heads": 0}))
    (broken / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(TameError, match=r"cannot be loaded: .*; it stays hidden"):
        publish(broken, files(broken), {}, SPEC.repo, SPEC, progress=silent)
    assert hub.model(SPEC.repo).private
    assert not [ref for ref in hub.model(SPEC.repo).refs if "tags" in ref]
