"""Sizes, dtypes, architectures and files at the edge of what is usual: transformers' own bytes, or one line that says why."""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from configs.errors import TameError
from configs.schema import Variant
from tests.models import tiny, with_own_code, zoo
from tests.test_quantize import METHODS, assert_same, by_transformers, quantized, tensors, variant_of


def rewrite(folder: Path, change: Any) -> None:
    """Put what `change` makes of each tensor, from its name and itself, into model.safetensors."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({name: change(name, t) for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **changed: Any) -> None:
    """Change config.json; a key that is None goes."""
    config = {**json.loads((folder / "config.json").read_text()), **changed}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


SIZES = ((36, 1), (100, 33), (68, 100), (64, 33))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_odd_sizes_have_transformers_bytes_and_can_be_restored(size: tuple[int, int], tmp_path: Path) -> None:
    """Rows of 1, 33, 36, 68 and 100 weights, and as many of them."""
    import transformers

    from tasks.quantize.methods import method_of

    hidden, intermediate = size
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=2
    )
    for number, method in enumerate(METHODS):
        dtype = ("bfloat16", "float16", "float32")[(number + SIZES.index(size)) % 3]
        source = tiny(tmp_path / f"{method}-source", config, dtype, spread=True)
        quantized(source, tmp_path / method, variant_of(method))
        assert_same(tmp_path / method, by_transformers(source, tmp_path / f"{method}-theirs", variant_of(method)))
        from safetensors.torch import load_file

        stored, plain = (load_file(f / "model.safetensors") for f in (tmp_path / method, source))
        for module in ("gate_proj", "down_proj"):
            path = f"model.layers.0.mlp.{module}."
            parts = {name.removeprefix(path): tensor for name, tensor in stored.items() if name.startswith(path)}
            weight = plain[f"{path}weight"].float()
            rows, columns = weight.shape
            restored = method_of(variant_of(method)).restore(parts, (rows, columns), "cpu")
            found = restored.piece(0, weight.numel()).view(weight.shape)
            assert (found - weight).abs().max() <= 0.35 * weight.abs().max()
            assert (found - weight).norm() < (0.02 if method == "int8" else 0.25) * weight.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [None, 1, 4_000, 50_000])
def test_all_parts_of_a_weight_are_in_one_file(
    method: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 4.53 to 4.55 do not open a checkpoint of which they are not."""
    monkeypatch.setattr("tasks.quantize.shards.SMALL", 10_000)
    source = tiny(tmp_path / "source", zoo("qwen2"))  # whose names of biases come between those of a weight's parts
    out = tmp_path / "out"
    quantized(source, out, variant_of(method), max_shard_size=limit)
    files = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    of_weight: dict[str, set[str]] = defaultdict(set)
    for name, file in files.items():
        module, weight, _ = name.partition(".weight")
        if not name.endswith("bias"):
            of_weight[module if weight else name.rpartition(".")[0]].add(file)
    assert len(of_weight) == 21
    assert [name for name, several in of_weight.items() if len(several) != 1] == []
    assert_same(out, by_transformers(source, tmp_path / "theirs", variant_of(method)))


@pytest.mark.parametrize("wide", ["norm", "lm_head"])
@pytest.mark.parametrize("sharded", [False, True])
def test_without_a_dtype_in_the_config_it_is_the_one_that_transformers_finds(
    wide: str, sharded: bool, tmp_path: Path
) -> None:
    """That of the first floating-point tensor: bfloat16 beside float32 norms, float32 where lm_head has that."""
    import torch

    source = tiny(tmp_path / "source")
    rewrite(source, lambda name, t: t.to(torch.float32) if wide in name else t)
    configure(source, dtype=None, torch_dtype=None)
    if sharded:
        from safetensors.torch import load_file, save_file

        state = load_file(source / "model.safetensors")
        names = sorted(state, reverse=True)  # so that the first file begins with another tensor than one file would
        places = {name: f"model-0000{1 + (number > 8)}-of-00002.safetensors" for number, name in enumerate(names)}
        for file in set(places.values()):
            save_file({name: state[name] for name in names if places[name] == file}, source / file, {"format": "pt"})
        (source / "model.safetensors").unlink()
        (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    made = quantized(source, tmp_path / "mine", variant_of("nf4"))
    assert_same(tmp_path / "mine", by_transformers(source, tmp_path / "theirs", variant_of("nf4")))
    expected = "float32" if wide == "lm_head" and not sharded else "bfloat16"
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["dtype"] == expected
    bits = 8 * made["weight_bytes"] / made["parameters"]
    assert bits < 14 if expected == "bfloat16" else bits > 17


@pytest.mark.parametrize(
    ("tensor", "at"),
    [("model.layers.0.self_attn.q_proj.weight", r"\[3, 5\]"), ("model.embed_tokens.weight", "element 197")],
)
@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_a_number_that_the_models_dtype_cannot_hold_is_not_called_broken(
    tensor: str, at: str, method: str, tmp_path: Path
) -> None:
    source = tiny(tmp_path / "source", dtype="float32")
    configure(source, dtype="float16")

    def change(name: str, found: Any) -> Any:
        if name == tensor:
            found[3, 5] = 70_000
        return found

    rewrite(source, change)
    expected = rf"{tensor} has 70000 at {at}, and float16, the model's dtype, ends at 65504; write another \"dtype\""
    with pytest.raises(TameError, match=expected):
        quantized(source, tmp_path / "out", variant_of(method))
    configure(source, dtype="bfloat16")
    if method == "nf4":
        quantized(source, tmp_path / "out", variant_of(method))


def test_an_infinite_float16_is_said_to_come_from_a_cast(tmp_path: Path) -> None:
    import torch

    source = tiny(tmp_path / "source")
    rewrite(source, lambda name, t: (t.float() * 1e8).half() if name == "model.norm.weight" else t.to(torch.float16))
    with pytest.raises(TameError, match=r"norm\.weight has inf at element 0: a larger number was cast to float16"):
        quantized(source, tmp_path / "out", variant_of("nf4"))


_SMALL = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2}
STATE_SPACE: dict[str, dict[str, Any]] = {
    "MambaConfig": _SMALL,
    "Mamba2Config": {**_SMALL, "num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "FalconMambaConfig": _SMALL,
    "RwkvConfig": {**_SMALL, "attention_hidden_size": 64, "context_length": 64},
    "RecurrentGemmaConfig": {
        **_SMALL, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4, "lru_width": 64,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STATE_SPACE)
def test_models_without_attention_have_transformers_bytes(kind: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, kind)(**STATE_SPACE[kind])
    source = tiny(tmp_path / "source", config, spread=True)
    for method in ("int8", "nf4"):
        made = quantized(source, tmp_path / method, variant_of(method))
        assert_same(tmp_path / method, by_transformers(source, tmp_path / f"{method}-theirs", variant_of(method)))
        assert made["quantized"] > 0.2 * made["parameters"]


def test_code_that_a_known_architecture_brings_is_not_needed(tmp_path: Path) -> None:
    """As Phi-3 does: transformers has the class, and nothing in the output points to the code that is left behind."""
    source = tiny(tmp_path / "source", zoo("phi3"))
    theirs = by_transformers(source, tmp_path / "theirs", variant_of("nf4"))
    configure(source, auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM", "AutoConfig": "c.Phi3Config"})
    (source / "modeling_phi3.py").write_text("raise RuntimeError")
    quantized(source, tmp_path / "mine", variant_of("nf4"))
    assert_same(tmp_path / "mine", theirs)
    assert "auto_map" not in json.loads((tmp_path / "mine" / "config.json").read_text())
    assert not (tmp_path / "mine" / "modeling_phi3.py").exists()


def test_code_of_a_model_runs_when_the_command_says_so(
    tmp_path: Path, tame_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tame

    source = with_own_code(tiny(tmp_path / "source"))
    out = tmp_path / "out"
    command = ["quantize", str(source), str(out), "--method", "int8", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        tame.main(command)
    assert ended.value.code == 2
    assert "it carries code (own_model.py)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        tame.main([*command, "--trust-remote-code"])
    assert ended.value.code == 0
    assert (out / "own_model.py").exists()
    assert "model.layers.0.mlp.up_proj.SCB" in tensors(out)


def test_a_checkpoint_is_run_when_that_is_asked_for_and_survives_a_kernel_that_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers' Mamba multiplies with the codes of a layer as if they were its weights: the checkpoint is right still."""
    from tasks.quantize.command import quantize_folder
    from tasks.quantize.protocols import Request

    source = tiny(tmp_path / "source", zoo("mamba"))
    with caplog.at_level(logging.WARNING, "tame.quantize"):
        quantize_folder(Request(source, tmp_path / "plain", Variant(method="nf4"), "cpu"))
        assert caplog.text == ""
        quantize_folder(Request(source, tmp_path / "checked", Variant(method="nf4"), "cpu"), check=True)
    assert "nf4 was written, and not run: MambaForCausalLM does not run on cpu" in caplog.text
    assert tensors(tmp_path / "checked") == tensors(tmp_path / "plain")


def test_a_checkpoint_that_gives_no_numbers_is_refused_when_it_is_run(tmp_path: Path) -> None:
    from tasks.quantize.command import quantize_folder
    from tasks.quantize.protocols import Request

    source = tiny(tmp_path / "source")
    rewrite(source, lambda name, t: t * 0 + 3e38 if "norm" in name else t)
    request = Request(source, tmp_path / "out", Variant(method="nf4"), "cpu")
    with pytest.raises(TameError, match="gives NaN or infinite numbers"):
        quantize_folder(request, check=True)
    assert not request.out.exists()
    quantize_folder(request)


def test_a_folder_is_quantized_without_prefect_and_without_hashing_the_source(tmp_path: Path, tame_home: Path) -> None:
    """Both take seconds of a command that takes ten for a model of 1.7 billion parameters."""
    import sqlite3
    import subprocess
    import sys

    source = tiny(tmp_path / "source")
    code = "import sys, tame\ntry: tame.main(sys.argv[1:])\nfinally: print('prefect' in sys.modules, 'torch' in sys.modules)"
    command = ["quantize", str(source), str(tmp_path / "out"), "--method", "nf4", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    assert (tmp_path / "out" / "model.safetensors").exists()
    if (tame_home / "digests.db").exists():
        with sqlite3.connect(tame_home / "digests.db") as known:
            paths = [path for (path,) in known.execute("SELECT path FROM digests")]
        assert not [path for path in paths if path.startswith(str(source))]
