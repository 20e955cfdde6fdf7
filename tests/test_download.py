"""Sources: local folders, a .gguf, and the Hub through its real client against tests/hub.py."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Source, Variant
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tasks.store import on_disk
from tests.hub import Hub
from tests.models import quantize

ROOT = Path(__file__).parent.parent


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that may be written into."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def in_process(hub: Hub, tmp_path: Path, model: str = "org/model", **environment: str) -> Any:
    """Download `model` in a fresh process, as the Hub client reads its settings when it is imported."""
    program = (
        "import sys, json\nfrom configs.schema import Source\nfrom configs.errors import TameError\n"
        "from tasks.download.task import download\n"
        f"try: print(download(Source(model={model!r})).model_dump_json())\n"
        "except TameError as e: print(json.dumps({'code': e.exit_code, 'error': str(e)}))"
    )
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TAME_HOME": str(tmp_path / "tame"),
        "NO_PROXY": "*", **environment,
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_folder_is_known_by_its_content_not_by_its_path(tame_home: Path, model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("not part of a release")
    (model / "pytorch_model.bin").write_bytes(b"neither is this")
    first = download(Source(model=str(model)))
    assert set(first.files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    moved = download(Source(model=str(shutil.move(model, tmp_path / "elsewhere"))))
    assert moved.digest == first.digest
    weights = tmp_path / "elsewhere" / "model.safetensors"
    stat = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert download(Source(model=str(tmp_path / "elsewhere"))).digest != first.digest


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **values} if path.exists() else values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rename_tensors(weights: Path, renamed: Callable[[str], str]) -> None:
    from safetensors.torch import load_file, save_file

    save_file({renamed(name): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})


OWN = {"auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.Y"}}


def damage(model: Path, how: str) -> None:
    weights, config = model / "model.safetensors", model / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "pickle only":
        weights.rename(model / "pytorch_model.bin")
    elif how == "no weights":
        weights.unlink()
    elif how == "code":
        (model / "modeling_x.py").write_text("print('run me')")
        change(config, model_type="x", architectures=["Y"], **OWN)
    elif how == "auto_map":
        change(config, architectures=["MyLlamaForCausalLM"], **OWN)
    elif how == "tokenizer code":
        (model / "tokenizer.json").unlink()
        change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    elif how == "quantized":
        change(config, quantization_config={"quant_method": "gptq"})
    elif how == "mlx":
        change(config, quantization={"group_size": 64, "bits": 4})
    elif how == "not json":
        config.write_text("{")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "no header":
        weights.write_bytes(b"\xff" * 100)
    elif how == "wrapped":
        rename_tensors(weights, lambda name: f"module.{name}")
    elif how == "fp16":
        weights.rename(model / "model.fp16.safetensors")
    elif how in ("adapter", "adapter with config"):
        weights.rename(model / "adapter_model.safetensors")
        change(model / "adapter_config.json", peft_type="LORA", base_model_name_or_path="/nowhere/base")
        if how == "adapter":
            config.unlink()
    elif how == "gguf inside":
        config.unlink()
        weights.rename(model / "x-q4.gguf")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("no config", 2, "no config.json"),
        ("pickle only", 2, "only pickled weights (pytorch_model.bin)"),
        ("no weights", 2, "no model.safetensors"),
        ("code", 2, "carries code (modeling_x.py)"),
        ("auto_map", 2, "carries code (an auto_map in config.json)"),
        ("tokenizer code", 2, "carries code (an auto_map in tokenizer_config.json)"),
        ("quantized", 2, "already quantized (gptq)"),
        ("mlx", 2, "already quantized (MLX, 4 bits)"),
        ("not json", 2, "config.json"),
        ("truncated", 1, "truncated?"),
        ("no header", 1, "truncated?"),
        ("wrapped", 2, "begins with module., as torch's DataParallel saves them"),
        ("fp16", 2, "model.fp16.safetensors, which transformers loads with variant='fp16' alone"),
        ("adapter", 2, "an adapter of /nowhere/base, which cannot be used"),
        ("adapter with config", 2, "an adapter of /nowhere/base, which cannot be used"),
        ("gguf inside", 2, "it holds x-q4.gguf and no config.json"),
    ],
)
def test_a_bad_folder_is_refused(tame_home: Path, model: Path, how: str, code: int, said: str) -> None:
    damage(model, how)
    with pytest.raises(TameError) as error:
        inspect_source(Source(model=str(model)))
    assert error.value.exit_code == code
    assert said in str(error.value)
    assert str(model) in str(error.value)


@pytest.mark.parametrize("how", ["wrapped", "mlx", "adapter", "fp16", "auto_map"])
def test_a_bad_repo_is_refused_before_its_weights_are_downloaded(model: Path, tmp_path: Path, how: str) -> None:
    damage(model, how)
    with Hub() as hub:
        hub.add_model("org/model", model)
        refused = in_process(hub, tmp_path)
    assert refused["code"] == 2
    assert "org/model" in refused["error"]
    assert not list((tmp_path / "hf").rglob("*model*.safetensors"))


def test_code_that_is_not_needed_is_left_behind(tame_home: Path, model: Path, tmp_path: Path) -> None:
    (model / "handler.py").write_text("print('run me')")
    (model / "modeling_llama.py").write_text("print('run me')")
    change(model / "config.json", **OWN)  # transformers has LlamaForCausalLM of its own
    snapshot = download(Source(model=str(model)))
    assert not [name for name in snapshot.files if name.endswith(".py")]
    quantize(model, tmp_path / "out", Variant(method="nf4"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_code_is_taken_along_only_where_it_was_allowed(tame_home: Path, model: Path) -> None:
    damage(model, "code")
    snapshot = download(Source(model=str(model), trust_remote_code=True))
    assert "modeling_x.py" in snapshot.files
    assert snapshot.trust_remote_code


@pytest.mark.parametrize("name", ["./nothing/here", "/nothing/here", "nothing.gguf", "a/b/c", "package:nothing/x.gguf"])
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match=name.split(":")[-1].split("/", maxsplit=1)[0] or "nothing"):
        inspect_source(Source(model=name))


def test_a_gguf_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one")
    with pytest.raises(BadInputError, match="not b'GGUF'"):
        inspect_source(Source(model=str(tmp_path / "x.gguf")))


def test_from_the_hub_pinned_complete_and_again_without_a_hub(model: Path, tmp_path: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "pytorch_model.bin").write_bytes(b"x" * 100)
    with Hub() as hub:
        hub.add_model("org/model", model)
        snapshot = in_process(hub, tmp_path)
        commit = snapshot["commit"]
        assert len(commit) == 40
        assert Path(snapshot["path"]).name == commit
        assert snapshot["name"] == "model"
        assert not {"README.md", "pytorch_model.bin"} & set(snapshot["files"])
        before = len(hub.requests)
        again = in_process(hub, tmp_path)
        assert again["digest"] == snapshot["digest"]
        assert again["cached"]
        assert len(hub.requests) - before <= 2
        hub.write("org/model", "config.json", hub.read("org/model", "config.json") + b" ")
        moved = in_process(hub, tmp_path)
        assert moved["commit"] != commit
        assert moved["digest"] != snapshot["digest"]
        hub.fail("GET /api/models/org/model", status=503, times=2)
        assert in_process(hub, tmp_path)["digest"] == moved["digest"]
    offline = in_process(hub, tmp_path)
    assert offline["commit"] == moved["commit"]
    assert offline["digest"] == moved["digest"]
    assert on_disk.digest_of(moved["files"]) == moved["digest"]


def test_one_of_the_machines_that_share_a_store_downloads(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    shared = {"TAME_STORE": str(tmp_path / "mount")}
    with Hub() as hub:
        hub.add_model("org/model", model)
        first = in_process(hub, tmp_path / "one", **shared)
        there = len(hub.requests)
        second = in_process(hub, tmp_path / "two", **shared)
        again = in_process(hub, tmp_path / "one", **shared)
    assert second["path"].startswith(str(tmp_path / "two" / "tame"))
    assert second["files"] == first["files"] == again["files"]
    assert [first["cached"], second["cached"], again["cached"]] == [False, True, True]
    assert len([request for request in hub.requests[there:] if "model.safetensors" in request]) == 1  # its header
    assert not list((tmp_path / "two" / "hf").rglob("model.safetensors"))


def test_the_hub_says_no(model: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        missing = in_process(hub, tmp_path)
        assert missing["code"] == 2
        assert "org/model does not exist" in missing["error"]
        hub.add_model("org/model", model, gated=True)
        gated = in_process(hub, tmp_path)
        assert gated["code"] == 2
        assert f"ask for access on {hub.url}/org/model" in gated["error"]
        assert "HF_TOKEN" in gated["error"]
    gone = in_process(hub, tmp_path)
    assert gone["code"] == 1
    assert "cannot be reached" in gone["error"]


def test_the_hub_has_a_bad_model(model: Path, tmp_path: Path) -> None:
    damage(model, "code")
    with Hub() as hub:
        hub.add_model("org/model", model)
        refused = in_process(hub, tmp_path)
    assert refused["code"] == 2
    assert "carries code" in refused["error"]
    assert not list((tmp_path / "hf").rglob("model.safetensors"))


def test_a_corrupted_download_is_caught_and_not_kept(model: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add_model("org/model", model)
        hub.corrupt("org/model", "model.safetensors", honest=False)
        caught = in_process(hub, tmp_path)
        assert caught["code"] == 1
        assert "model.safetensors arrived with sha256" in caught["error"]
        assert not list((tmp_path / "hf").rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("readme", "card", "licence"),
    [
        ("---\nlicense: mit\nbase_model: org/base\ntags: [a]\n---\n# Mine\n", {"license": "mit", "base_model": "org/base"}, "mit"),
        ("# No front matter\n", {}, None),
        ("---\nlicense: [\n---\n", {}, None),
        ("---\njust text\n---\n", {}, None),
    ],
)  # fmt: skip
def test_a_local_folders_own_card_says_what_it_is(
    readme: str, card: dict[str, str], licence: str | None, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "mine")
    (folder / "README.md").write_text(readme)
    found = inspect_source(Source(model=str(folder)))
    assert (found.card, found.licence) == (card, licence)
