"""LoRA adapters: the bytes of PEFT's merge_and_unload, tensor by tensor, and a source that is an adapter alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError
from configs.schema import Source
from tasks.download.adapter_merge import CONFIG, WEIGHTS, changes_of
from tasks.download.checkpoint import Stored
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tests.hub import Hub
from tests.models import tiny, zoo
from tests.test_download import in_process

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}},
    ),
    "rslora": ("llama", {"target_modules": ["v_proj"], "use_rslora": True}),
    "dora": ("llama", {"target_modules": ["q_proj", "gate_proj"], "use_dora": True}),
    "dora, rslora": ("llama", {"target_modules": ["o_proj"], "use_dora": True, "use_rslora": True}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "tied": ("qwen3-tied", {"target_modules": ["up_proj", "k_proj"]}),
}


def adapted(folder: Path, case: str) -> tuple[Path, Path, Any]:
    """A base, a random adapter of it in bfloat16, and the model that PEFT makes of the two."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    name, options = CASES[case]
    base = tiny(folder / "base", zoo(name), seed=3, spread=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    model = get_peft_model(model, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter if "magnitude" in str(options) else 0))
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder / "adapter")
    return base, folder / "adapter", loaded.merge_and_unload()


def write_adapter(folder: Path, base: str | None, **config: Any) -> Path:
    """An adapter of `base` that changes one weight, written without PEFT."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    draws = torch.Generator().manual_seed(0)
    sides = {"A": torch.randn(2, 64, generator=draws), "B": torch.randn(64, 2, generator=draws)}
    save_file({f"{name}.lora_{side}.weight": part for side, part in sides.items()}, folder / WEIGHTS)
    known = {"peft_type": "LORA", "base_model_name_or_path": base, "lora_alpha": 4, "r": 2, **config}
    (folder / CONFIG).write_text(json.dumps(known))
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_pefts_merge(case: str, tmp_path: Path, tame_home: Path) -> None:
    pytest.importorskip("peft")
    base, adapter, model = adapted(tmp_path, case)
    snapshot = download(Source(model=str(base), adapter=str(adapter)))
    model.save_pretrained(tmp_path / "merged")
    ours, theirs = tensors_of(Path(snapshot.path)), tensors_of(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert (ours[name] == tensor).all(), name
    before = tensors_of(base)
    assert any((before[name] != tensor).any() for name, tensor in ours.items())


def test_an_adapter_alone_finds_its_base_and_the_key_covers_both(
    tmp_path: Path, tiny_llama: Path, tame_home: Path
) -> None:
    adapter = write_adapter(tmp_path / "mine", str(tiny_llama))
    alone, both = Source(model=str(adapter)), Source(model=str(tiny_llama), adapter=str(adapter))
    found = inspect_source(alone)
    assert (found.name, found.path) == ("mine", str(tiny_llama))
    first, second = download(alone, found), download(both)
    assert first.digest == second.digest
    assert (first.cached, second.cached) == (False, True)
    assert first.adapter is not None
    assert first.adapter.model == str(adapter)
    assert first.model == str(tiny_llama)
    other = tiny(tmp_path / "other", seed=9)
    assert not download(both.model_copy(update={"model": str(other)})).cached
    changed = write_adapter(tmp_path / "changed", str(tiny_llama), lora_alpha=8)
    assert download(both.model_copy(update={"adapter": str(changed)})).digest != first.digest


@pytest.mark.e2e
def test_base_and_adapter_on_the_hub(tmp_path: Path, tiny_llama: Path) -> None:
    with Hub() as hub:
        hub.add_model("org/base", tiny_llama)
        hub.add_model("me/lora", write_adapter(tmp_path / "mine", "org/base"))
        snapshot = in_process(hub, tmp_path, "me/lora")
    assert (snapshot["model"], snapshot["name"]) == ("org/base", "lora")
    assert snapshot["adapter"]["model"] == "me/lora"
    assert len({snapshot["commit"], snapshot["adapter"]["commit"], None}) == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
        ({"use_qalora": True}, "adapter_config.json has use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"bias": "all"}, "bias: all"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path, tiny_llama: Path
) -> None:
    adapter = write_adapter(tmp_path / "mine", str(tiny_llama), **config)
    with pytest.raises(BadInputError, match=said):
        inspect_source(Source(model=str(tiny_llama), adapter=str(adapter)))


def test_a_base_that_is_quantized_takes_no_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    adapter = write_adapter(tmp_path / "mine", str(base))
    with pytest.raises(BadInputError, match="quantized"):
        inspect_source(Source(model=str(base), adapter=str(adapter)))
    with pytest.raises(BadInputError, match=r"its base .* is quantized; give the base in 16 or 32 bits"):
        inspect_source(Source(model=str(base), adapter=str(adapter)), quantized=True)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, tiny_llama: Path, tame_home: Path) -> None:
    adapter = write_adapter(tmp_path / "mine", None)
    with pytest.raises(BadInputError, match="does not name its base"):
        inspect_source(Source(model=str(adapter)))
    base = tiny(tmp_path / "gpt2", zoo("gpt2"))
    with pytest.raises(
        BadInputError, match=r"changes model.layers.0.self_attn.q_proj.weight, and the base has no tensor"
    ):
        download(Source(model=str(base), adapter=str(adapter)))


@pytest.mark.parametrize("name", ["embed_tokens.weight", "embed_tokens.lora_embedding_A"])
def test_an_embedding_that_is_the_output_head_too_is_refused(name: str) -> None:
    tied = {one: Stored(one, "BF16", (4, 4), "f", 0, 32) for one in ("model.embed_tokens.weight", "model.norm.weight")}
    apart = {**tied, "lm_head.weight": Stored("lm_head.weight", "BF16", (4, 4), "f", 0, 32)}
    names = [f"base_model.model.model.{name}"]
    with pytest.raises(BadInputError, match="which is the output head of the base, too"):
        changes_of(names, tied, Path("adapter"))
    [change] = changes_of(names, apart, Path("adapter"))
    assert change.tensor.name == "model.embed_tokens.weight"
