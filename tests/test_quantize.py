"""Quantizing gives what transformers gives, tensor for tensor and byte for byte, and survives being killed."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Source, Variant
from tests.models import NOT_QUANTIZED, ZOO, quantize, tiny, zoo

ROOT = Path(__file__).parent.parent
METHODS = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
ARCHITECTURES = (
    "llama", "odd", "qwen2", "qwen3", "qwen3-tied", "mistral", "gemma3", "phi3", "gpt2", "opt", "gpt-neox", "mixtral",
    "qwen3-moe", "deepseek-v3", "t5", "llava",
)  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


def variant_of(method: str, **options: Any) -> Variant:
    if method != "int8":
        options.setdefault("compute_dtype", "float32")  # what transformers writes when it is not told
    return Variant(method=method.removesuffix("-dq"), double_quant=method.endswith("-dq"), **options)


def quantized(source: Path, out: Path, variant: Variant, **options: Any) -> dict[str, Any]:
    from tests.models import quantize

    return quantize(source, out, variant, **options).model_dump()


def by_transformers(source: Path, out: Path, variant: Variant, skip: list[str] | None = None, **save: Any) -> Path:
    import transformers

    if variant.method == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=variant.method,
            bnb_4bit_use_double_quant=variant.double_quant,
            llm_int8_skip_modules=skip,
        )
    cls = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    cls.from_pretrained(source, quantization_config=config).save_pretrained(out, **save)
    return out


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    from tasks.download.checkpoint import read_header

    return {
        name: (tensor.dtype, tensor.shape, file.read_bytes()[tensor.start : tensor.end])
        for file in folder.glob("*.safetensors")
        for name, tensor in read_header(file, file.name).items()
    }


def assert_same(mine: Path, theirs: Path) -> None:
    one, other = tensors(mine), tensors(theirs)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (mine, theirs)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[0]["dtype"] == configs[1]["dtype"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_are_transformers_own(name: str, tmp_path: Path) -> None:
    number = ARCHITECTURES.index(name)
    sharded = {"max_shard_size": "60KB"} if number % 2 else {}
    source = tiny(tmp_path / "source", zoo(name), DTYPES[number % 3], spread=True, **sharded)
    for method in ("int8", "nf4", METHODS[2 + number % 3]):
        made = quantized(source, tmp_path / method, variant_of(method))
        theirs = by_transformers(source, tmp_path / f"{method}-theirs", variant_of(method))
        assert_same(tmp_path / method, theirs)
        assert made["parameters"] == made["quantized"] + sum(left["parameters"] for left in made["left"])
        if not method.endswith("-dq"):
            files = [folder / "model.safetensors" for folder in (tmp_path / method, theirs)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_the_zoo_holds_them_all() -> None:
    assert set(ARCHITECTURES) <= set(ZOO)


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_are_transformers_own_on_a_gpu(method: str, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", zoo("gpt2"), spread=True)
    quantized(source, tmp_path / "mine", variant_of(method), device="cuda:0")
    assert_same(tmp_path / "mine", by_transformers(source, tmp_path / "theirs", variant_of(method)))


LEAN = """
import sys
from pathlib import Path
from configs.schema import Variant
from tasks.quantize.lean_imports import only_make_models
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request
only_make_models()
out = Path(sys.argv[2])
out.mkdir()
for method in sys.argv[3:]:
    (out / method).mkdir()
    method_of(Variant(method=method)).quantize(Request(Path(sys.argv[1]), out / method, Variant(method=method), "cpu"))
from transformers import modeling_utils
heavy = ("scipy.", "torch._dynamo.", "torch.distributed.tensor")
print([name for name in sys.modules if name.startswith(heavy)])
"""


def test_the_bytes_are_the_same_without_what_running_a_model_needs(tmp_path: Path, tiny_llama: Path) -> None:
    methods = ("nf4", "int8", "w4a16", "fp8")
    command = [sys.executable, "-c", LEAN, str(tiny_llama), str(tmp_path / "lean"), *methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['torch._dynamo._trace_wrapped_higher_order_op']"  # a placeholder
    for method in methods:
        quantize(tiny_llama, tmp_path / method, Variant(method=method))
        names = sorted(path.name for path in (tmp_path / method).iterdir())
        for name in names:
            assert (tmp_path / "lean" / method / name).read_bytes() == (tmp_path / method / name).read_bytes(), name


def test_double_quantization_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """The mean of many scales does: torch splits it over its threads. It is that of one thread."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=4
    )
    source = tiny(tmp_path / "source", config)
    alone = by_transformers(source, tmp_path / "alone", variant_of("nf4-dq"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            quantized(source, tmp_path / f"mine-{threads}", variant_of("nf4-dq"))
            assert_same(tmp_path / f"mine-{threads}", alone)
        torch.set_num_threads(3)
        together = by_transformers(source, tmp_path / "together", variant_of("nf4-dq"))
    finally:
        torch.set_num_threads(before)
    assert tensors(together) != tensors(alone)


def test_weights_are_cast_to_the_models_dtype_first(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", zoo("t5"), "float32", spread=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    quantized(source, tmp_path / "mine", variant_of("nf4"))
    assert_same(tmp_path / "mine", by_transformers(source, tmp_path / "theirs", variant_of("nf4")))
    assert {found[0] for name, found in tensors(tmp_path / "mine").items() if name.endswith("wo.weight")} == {"F32"}


def test_a_tied_head_that_is_stored_too_is_written_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny(tmp_path / "source", zoo("qwen3-tied"))
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    quantized(source, tmp_path / "mine", variant_of("int8"))
    assert_same(tmp_path / "mine", by_transformers(source, tmp_path / "theirs", variant_of("int8")))
    assert "lm_head.weight" not in tensors(tmp_path / "mine")
    state["lm_head.weight"] += 1
    save_file(state, source / "model.safetensors", {"format": "pt"})
    quantized(source, tmp_path / "untied", variant_of("int8"))
    assert_same(tmp_path / "untied", by_transformers(source, tmp_path / "untied-theirs", variant_of("int8")))
    assert "lm_head.weight" in tensors(tmp_path / "untied")


@pytest.mark.parametrize("method", ["int8", "nf4", "nf4-dq"])
def test_output_in_several_files(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "mine", variant_of(method), max_shard_size=50_000)
    theirs = by_transformers(tiny_llama, tmp_path / "theirs", variant_of(method), max_shard_size=50_000)
    assert_same(tmp_path / "mine", theirs)
    indexes = [
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (tmp_path / "mine", theirs)
    ]
    assert indexes[0]["metadata"] == indexes[1]["metadata"]
    assert indexes[0]["weight_map"].keys() == indexes[1]["weight_map"].keys()
    files = {file.name: file.stat().st_size for file in (tmp_path / "mine").glob("*.safetensors")}
    assert set(indexes[0]["weight_map"].values()) == files.keys()
    assert len(files) > 2


def test_skipped_modules_are_skipped_besides_those_that_transformers_skips(tiny_llama: Path, tmp_path: Path) -> None:
    variant = variant_of("nf4", skip_modules=["model.layers.0"])
    made = quantized(tiny_llama, tmp_path / "mine", variant)
    theirs = by_transformers(tiny_llama, tmp_path / "theirs", variant, skip=["lm_head", "model.layers.0"])
    assert_same(tmp_path / "mine", theirs)
    assert {left["reason"] for left in made["left"] if "layers" in left["module"] and "norm" not in left["module"]} == {
        "skip_modules of the recipe"
    }
    with pytest.raises(BadInputError, match=r"'model\.layers\.7' matches no module"):
        quantized(tiny_llama, tmp_path / "wrong", variant_of("nf4", skip_modules=["model.layers.7"]))


def test_experts_that_stay_in_16_bits_are_said_out_loud(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", zoo("mixtral"))
    made = quantized(source, tmp_path / "mine", variant_of("nf4"))
    assert made["quantized"] / made["parameters"] < 0.1
    assert "46% of the parameters" in made["notes"][0]
    assert "fused expert weights" in made["notes"][0]


@pytest.mark.parametrize(
    ("name", "shape", "share"),
    [
        ("model.mtp.weight", [512, 64], "19.0%"),
        ("model.layers.0.self_attn.q_proj.bias", [64], "0.0%"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", [8], None),  # which transformers computes itself
        ("model.layers.0.attn.bias", [1, 1, 8, 8], None),
    ],
)
def test_what_transformers_does_not_load_is_said_to_be_left_out(
    tmp_path: Path, name: str, shape: list[int], share: str | None
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = tiny(tmp_path / "source")
    state = {**load_file(source / "model.safetensors"), name: torch.ones(shape, dtype=torch.bfloat16)}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    made = quantized(source, tmp_path / "mine", variant_of("nf4"))
    assert made["notes"] == ([] if share is None else [
        f"1 tensors of the source ({share} of its bytes), such as {name}, are no part of LlamaForCausalLM in "
        "transformers and are left out."
    ])  # fmt: skip
    assert_same(tmp_path / "mine", by_transformers(source, tmp_path / "theirs", variant_of("nf4")))


def test_a_model_of_which_nothing_would_be_quantized_is_refused(tmp_path: Path) -> None:
    import transformers

    kind, values = NOT_QUANTIZED
    source = tiny(tmp_path / "source", getattr(transformers, kind)(**values))
    with pytest.raises(BadInputError, match=r"no layer of FalconForCausalLM: .* of the model's own class"):
        quantized(source, tmp_path / "mine", variant_of("nf4"))


def test_what_is_carried_along(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    for name in (
        "README.md",
        "LICENSE",
        "USE_POLICY.md",
        "pytorch_model.bin",
        "chat_template.jinja",
        "code.py",
        "other.json",
    ):
        (source / name).write_text(name)
    quantized(source, tmp_path / "mine", variant_of("int8"))
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "LICENSE", "USE_POLICY.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_config_keeps_what_it_had(tiny_llama: Path, tmp_path: Path) -> None:
    quantized(tiny_llama, tmp_path / "mine", variant_of("fp4", compute_dtype="bfloat16"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_llama, tmp_path / "mine"))
    assert after.pop("quantization_config")["bnb_4bit_compute_dtype"] == "bfloat16"
    quantized(tiny_llama, tmp_path / "own", Variant(method="nf4"))
    own = json.loads((tmp_path / "own" / "config.json").read_text())
    assert own["quantization_config"]["bnb_4bit_compute_dtype"] == own["dtype"] == "bfloat16"
    assert after == before


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize(("method", "name"), [("nf4", "odd"), ("nf4-dq", "llama"), ("fp4", "llama")])
def test_groups_of_other_sizes_are_bitsandbytes_own_and_load(method: str, name: str, size: Any, tmp_path: Path) -> None:
    import torch
    import transformers
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file

    source = tiny(tmp_path / "source", zoo(name), spread=True)
    quantized(source, tmp_path / "made", variant_of(method, group_size=size))
    weights, made = load_file(source / "model.safetensors"), load_file(tmp_path / "made" / "model.safetensors")
    count = 0
    for name, weight in weights.items():
        own = {key for key in made if key.startswith(f"{name}.")}
        if not own:
            assert torch.equal(made[name], weight)
            continue
        count += 1
        codes, state = quantize_4bit(
            weight, blocksize=size, compress_statistics=method.endswith("-dq"), quant_type=method.removesuffix("-dq")
        )
        expected = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        assert own == expected.keys()
        assert torch.equal(made[name], codes)
        assert all(torch.equal(made[key], value) for key, value in expected.items())
    assert count
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        assert bool(model(torch.arange(1, 9)[None]).logits.isfinite().all())


def test_single_modules_can_have_smaller_groups(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    module = "model.layers.1.mlp.down_proj"
    for name, options in {"plain": {}, "small": {"group_size": 32}, "mixed": {"small_group_modules": [module]}}.items():
        quantized(tiny_llama, tmp_path / name, variant_of("nf4", **options))
    plain, small, mixed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "small", "mixed"))
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (small if name.startswith(module) else plain)[name])
    with pytest.raises(BadInputError, match=r"small_group_modules: 'mlp.up' matches no module that is quantized"):
        quantized(tiny_llama, tmp_path / "no", variant_of("nf4", small_group_modules=["mlp.up"]))
    for options, said in (
        ({"group_size": 32, "small_group_modules": [module]}, "leave one out"),
        ({"group_size": -1}, "group_size -1 belongs to w4a16 and w8a16"),
    ):
        with pytest.raises(ValueError, match=said):
            variant_of("nf4", **options)


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_kernels_agree_with_bitsandbytes_at_every_magnitude(method: str, dtype: str, size: Any) -> None:
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    from tasks.quantize.methods import bitsandbytes_4bit, bitsandbytes_8bit

    weights = torch.randn(1200, 320, generator=torch.Generator().manual_seed(1))
    weights *= torch.logspace(-6, 3, 1200)[:, None]
    weights[7] = 0
    weights[8:16] = weights[8:16].sign()
    if dtype != "float16":
        weights[16:24] *= 1e-38
        weights[24:32] *= 1e-44 if method != "int8" else 1
    block = weights.to(getattr(torch, dtype))
    if method == "int8":
        codes, scales = bitsandbytes_8bit.quantize_rows(block, variant_of(method))
        expected, expected_scales, _ = int8_vectorwise_quant(block.half())
    else:
        codes, scales = bitsandbytes_4bit.quantize_rows(block, variant_of(method, group_size=size))
        expected, state = quantize_4bit(block, blocksize=size, quant_type=method)
        expected_scales = state.absmax
        assert bitsandbytes_4bit._agrees(method, block.dtype, size)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, expected_scales)


def test_a_kernel_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    from tasks.quantize.methods import bitsandbytes_4bit

    table, bounds, order = bitsandbytes_4bit._table("nf4")
    monkeypatch.setattr(bitsandbytes_4bit, "_table", lambda method: (table, bounds + 0.001, order))
    monkeypatch.setattr(bitsandbytes_4bit, "_agrees", functools.cache(bitsandbytes_4bit._agrees.__wrapped__))
    block = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    codes, _ = bitsandbytes_4bit.quantize_rows(block, variant_of("nf4"))
    assert torch.equal(codes, quantize_4bit(block, quant_type="nf4")[0])
    assert "rounds nf4 differently" in caplog.text


def killed_at(share: float) -> Any:
    """A progress that kills its process once `share` of the bytes are done."""

    def progress(what: str, done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def work_and_be_killed(source: Path, out: Path, variant: Variant) -> None:
    quantized(source, out, variant, progress=killed_at(0.8), max_shard_size=150_000)


@pytest.mark.parametrize("method", ["nf4-dq"])
def test_a_killed_run_is_taken_up(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.quantize.tensor import Worker
    from tasks.runtime.child_process import isolated

    source = tiny(tmp_path / "source", zoo("qwen3-moe"), spread=True)
    whole = quantized(source, tmp_path / "whole", variant_of(method), max_shard_size=150_000)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(TameError, match="SIGKILL"):
        isolated("quantize", work_and_be_killed, source, out, variant_of(method))
    entries = [json.loads(line) for line in (out / ".journal").read_text().splitlines()[1:]]
    finished = [name for name, *entry in entries if len(entry) == 2]
    for file in out.glob("*.safetensors"):  # pages that never reached the disk
        with file.open("r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            opened.write(bytes(64))
    redone = []
    real = Worker._quantize, Worker._copy
    monkeypatch.setattr(Worker, "_quantize", lambda self, job: redone.append(job) or real[0](self, job))
    monkeypatch.setattr(Worker, "_copy", lambda self, job: redone.append(job) or real[1](self, job))
    again = quantized(source, out, variant_of(method), max_shard_size=150_000)
    assert again["digests"] == whole["digests"]
    unfinished = len(tensors(source)) - len(finished)
    assert unfinished < len(redone) <= unfinished + len(list(out.glob("*.safetensors")))
    assert not (out / ".journal").exists()


def test_what_a_killed_run_hashed_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.quantize import file_digests
    from tasks.runtime.child_process import isolated

    source = tiny(tmp_path / "source", zoo("qwen3-moe"), spread=True)
    whole = quantized(source, tmp_path / "whole", variant_of("int8"), max_shard_size=150_000)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(TameError, match="SIGKILL"):
        isolated("quantize", work_and_be_killed, source, out, variant_of("int8"))
    entries = [json.loads(line) for line in (out / ".journal").read_text().splitlines()[1:]]
    hashed = {name for name, *entry in entries if len(entry) == 1}
    again = set()
    real = file_digests._sha256
    monkeypatch.setattr(file_digests, "_sha256", lambda shard, *rest: again.add(shard.path.name) or real(shard, *rest))
    assert quantized(source, out, variant_of("int8"), max_shard_size=150_000)["digests"] == whole["digests"]
    assert again == whole["digests"].keys() - hashed


@pytest.mark.parametrize("method", ["int8", "nf4", "fp4-dq"])
def test_digests_are_those_of_the_files(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tensors to a file, and of a file that one tensor fills, which is hashed while it is written."""
    import hashlib

    from tasks.download.checkpoint import read_header

    monkeypatch.setattr("tasks.quantize.engine.COPY", 10_000)
    monkeypatch.setattr("tasks.quantize.file_digests.PIECE", 3_000)
    source = tiny(tmp_path / "source", zoo("qwen3"))
    out = tmp_path / "out"
    digests = quantized(source, out, variant_of(method), max_shard_size=60_000)["digests"]
    files = list(out.glob("*.safetensors"))
    assert [list(read_header(file, file.name)) for file in files].count(["model.embed_tokens.weight"]) == 1
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert len(files) > 2


def test_what_another_variant_left_is_not_taken_up(tiny_llama: Path, tmp_path: Path) -> None:
    expected = quantized(tiny_llama, tmp_path / "clean", variant_of("nf4"))["digests"]
    out = tmp_path / "out"
    quantized(tiny_llama, out, variant_of("int8"), max_shard_size=50_000)
    assert quantized(tiny_llama, out, variant_of("nf4"))["digests"] == expected
    assert len(list(out.glob("model*"))) == 1


def test_the_store_and_the_folder_give_one_digest(tiny_llama: Path, tmp_path: Path, tame_home: Path) -> None:
    import hashlib

    from tasks.download.task import download
    from tasks.quantize.command import quantize_folder
    from tasks.quantize.protocols import Request
    from tasks.quantize.task import quantize, quantize_inputs

    snapshot = download(Source(model=str(tiny_llama)))
    made = quantize(snapshot, variant_of("nf4"), device="cpu")
    again = quantize(snapshot, variant_of("nf4", name="other"), device="cpu")
    assert not made.cached
    assert again == made.model_copy(update={"cached": True})
    assert made.bits_per_weight == 8 * (Path(made.path) / "model.safetensors").stat().st_size / made.parameters
    for name, digest in made.files.items():
        assert hashlib.sha256((Path(made.path) / name).read_bytes()).hexdigest() == digest
    request = Request(tiny_llama, tmp_path / "out", variant_of("nf4"), "cpu")
    folder = quantize_folder(request)
    assert (folder.digest, folder.files, folder.bytes) == (made.digest, made.files, made.bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tame-home"]
    with pytest.raises(BadInputError, match="not an empty folder"):
        quantize_folder(request)
    inputs = quantize_inputs(snapshot, variant_of("nf4"), "cuda:1")
    assert inputs == quantize_inputs(snapshot, variant_of("nf4", name="x"), "cuda:0")
    assert inputs != quantize_inputs(snapshot, variant_of("nf4"), "cpu")


@pytest.mark.parametrize("name", ["llama", "t5", "llava"])
def test_a_forward_pass_tells_whether_the_output_is_finite(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tasks.quantize.check import runs

    out = tmp_path / "mine"
    quantized(tiny(tmp_path / "source", zoo(name)), out, variant_of("nf4"))
    assert runs(out, "cpu")[0] is True
    state = load_file(out / "model.safetensors")
    norm = next(key for key in state if "norm" in key and "encoder" not in key and "vision" not in key)
    state[norm][:] = float("nan")
    save_file(state, out / "model.safetensors", {"format": "pt"})
    assert runs(out, "cpu")[0] is False


def test_a_preview_is_what_comes_out(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    from tasks.quantize.preview import preview

    methods = ["int8", "nf4", "fp4-dq"]
    (tmp_path / "config").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "config")
    with_weights, without = (
        preview(path, [variant_of(m) for m in methods]) for path in (tiny_llama, tmp_path / "config")
    )
    assert with_weights == without
    for method, expected in zip(methods, with_weights, strict=True):
        made = quantized(tiny_llama, tmp_path / method, variant_of(method))
        assert (made["parameters"], made["quantized"], made["left"]) == tuple(
            expected[key] for key in ("parameters", "quantized", "left")
        )
        assert expected["weight_bytes"] < made["weight_bytes"] < expected["weight_bytes"] + 12_000
