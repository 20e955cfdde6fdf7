"""Every fault is named, with file and tensor, and leaves nothing behind that looks complete."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks.download.checkpoint import check_source, read_header, read_tensors

NF4 = Variant(method="nf4")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import tiny

    return tiny(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="60KB")


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the JSON header of a safetensors file; its data stays."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8 : 8 + length])
    text = change(parsed) or json.dumps(parsed)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])


def rewrite(folder: Path, **changed: Any) -> None:
    """Put other tensors into model.safetensors."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    for name, change in changed.items():
        key = name.replace("__", ".")
        state[key] = change(state[key])
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def lose_the_end(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def huge_header(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((10**15).to_bytes(8, "little") + content[8:])


def lying_shape(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: h[Q_PROJ].update(shape=[64, 65]))


def overlap(folder: Path) -> None:
    def change(h: dict[str, Any]) -> None:
        offsets = h[Q_PROJ]["data_offsets"]
        h[Q_PROJ]["data_offsets"] = [offsets[0] - 64, offsets[1] - 64]

    header(folder / "model.safetensors", change)


def twice_in_header(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: json.dumps(h)[:-1] + f', "{Q_PROJ}": {json.dumps(h[Q_PROJ])}}}')


def unknown_dtype(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: h[Q_PROJ].update(dtype="F12"))


def not_json(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: "{nonsense")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**extra: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **extra}))

    return change


def gptq_file(folder: Path) -> None:
    (folder / "quantize_config.json").write_text("{}")


def fp8_tensor(folder: Path) -> None:
    import torch

    rewrite(folder, model__norm__weight=lambda t: t.to(torch.float8_e4m3fn))


def awq_tensor(folder: Path) -> None:
    header(folder / "model.safetensors", lambda h: h.update({"model.layers.0.qweight": h.pop(Q_PROJ)}))


CHECKED = [
    (truncate, TameError, r"model\.safetensors: the header claims \d+ bytes of a file of 1000; truncated"),
    (lose_the_end, TameError, r"model\.safetensors: its tensors need \d+ bytes, the file has \d+; truncated"),
    (huge_header, TameError, r"the header claims 1000000000000000 bytes"),
    (lying_shape, TameError, r"q_proj\.weight BF16 \[64, 65\] needs 8320 bytes, the header gives it 8192"),
    (overlap, TameError, r"q_proj\.weight overlaps the tensor before it"),
    (twice_in_header, TameError, r"q_proj\.weight' comes twice"),
    (unknown_dtype, TameError, r"q_proj\.weight has dtype F12; expected one of"),
    (not_json, TameError, r"model\.safetensors: the header is not safetensors JSON"),
    (no_config, BadInputError, r"no config\.json"),
    (broken_config, TameError, r"config\.json: not valid JSON"),
    (only_pickled, BadInputError, r"pytorch_model\.bin will not do"),
    (configured(quantization_config={"quant_method": "gptq"}), BadInputError, r"already quantized \(gptq\)"),
    (configured(text_config={"quantization_config": {"quant_method": "awq"}}), BadInputError, r"quantized \(awq\)"),
    (gptq_file, BadInputError, r"quantize_config\.json: the model is already quantized"),
    (fp8_tensor, BadInputError, r"norm\.weight \(F8_E4M3\) says that the model is already quantized"),
    (awq_tensor, BadInputError, r"qweight \(BF16\) says that the model is already quantized"),
]


@pytest.mark.parametrize(("fault", "kind", "message"), CHECKED, ids=lambda value: getattr(value, "__name__", None))
def test_a_source_that_cannot_be_used_is_refused(
    fault: Callable[[Path], None], kind: type[TameError], message: str, model: Path
) -> None:
    check_source(model)
    fault(model)
    with pytest.raises(kind, match=message) as raised:
        check_source(model)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_an_index_that_disagrees_with_its_files(sharded: Path, tmp_path: Path) -> None:
    def index(change: Callable[[dict[str, str], Path], Any], name: str) -> Path:
        folder = Path(shutil.copytree(sharded, tmp_path / name))
        content = json.loads((folder / "model.safetensors.index.json").read_text())
        change(content["weight_map"], folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder

    first, outside = "model-00001-of-00005.safetensors", tmp_path / "out.bin"
    cases = [
        ("gone", lambda m, folder: (folder / m[Q_PROJ]).unlink(), "missing, though model.safetensors.index.json names it"),
        ("elsewhere", lambda m, folder: m.update({Q_PROJ: "model-00005-of-00005.safetensors"}), "which does not hold it"),
        ("climbs", lambda m, folder: m.update({Q_PROJ: "../secret.safetensors"}), "not a safetensors file of this folder"),
        ("twice", lambda m, folder: (shutil.copy(folder / first, folder / "x.safetensors"), m.update(y="x.safetensors")),
         "places y in x.safetensors"),
        ("linked", lambda m, folder: (folder / first).rename(outside) and (folder / first).symlink_to(outside),
         "a link that leads out of the folder"),
    ]  # fmt: skip
    for name, change, message in cases:
        with pytest.raises(TameError, match=message):
            read_tensors(index(change, name))
    folder = index(lambda m, folder: None, "both")
    shutil.copy(folder / first, folder / "x.safetensors")
    content = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = next(iter(read_header(folder / "x.safetensors", "x.safetensors")))
    text = json.dumps(content)[:-2] + f', "{stored}": "x.safetensors"}}}}'
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(TameError, match="comes twice"):
        read_tensors(folder)


def test_links_inside_the_hubs_cache_are_followed(tiny_llama: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_llama, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_source(snapshot)


def work(source: Path, out: Path, variant: Variant, **options: Any) -> Any:
    from tests.models import quantize

    return quantize(source, out, variant, **options).model_dump()


def put(value: float, row: int = 3, column: int = 5) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[row, column] = value
        return tensor

    return change


def scaled(factor: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[2] *= factor
        return tensor

    return change


Q = Q_PROJ.replace(".", "__")
BROKEN = [
    ("nf4", {Q: put(float("nan"))}, r"q_proj\.weight has nan at \[3, 5\]; the checkpoint is broken"),
    ("fp4", {Q: put(float("-inf"))}, r"q_proj\.weight has -inf at \[3, 5\]"),
    ("int8", {Q: put(float("inf"))}, r"q_proj\.weight has inf at \[3, 5\]"),
    ("int8", {Q: put(70000.0)}, r"q_proj\.weight: row 3 has weights up to 7\.01e\+04, which float16.*cannot hold; use nf4"),
    ("int8", {Q: scaled(1e-9)}, r"q_proj\.weight: row 2 has weights up to .*, which float16"),
    ("nf4", {"model__embed_tokens__weight": put(float("nan"))}, r"embed_tokens\.weight has nan at element 197"),
    ("nf4", {"model__norm__weight": lambda t: t[:32].clone()}, r"norm\.weight has shape \[32\], LlamaForCausalLM expects \[64\]"),
    ("nf4", {Q: lambda t: t.to(int_dtype())}, r"q_proj\.weight is I16; expected F16, BF16 or F32"),
    ("nf4", {Q: lambda t: t.double()}, r"q_proj\.weight is F64; expected F16, BF16 or F32"),
]  # fmt: skip


def int_dtype() -> Any:
    import torch

    return torch.int16


@pytest.mark.parametrize(("method", "changed", "message"), BROKEN)
def test_weights_that_cannot_be_quantized_are_named(
    method: Any, changed: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    rewrite(model, **changed)
    with pytest.raises(TameError, match=r"model\.safetensors.*" + message):
        work(model, tmp_path / "out", Variant(method=method))


def test_a_failure_keeps_nobody_waiting(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding is in a file of its own, which is hashed while it is written."""
    monkeypatch.setattr("tasks.quantize.engine.COPY", 10_000)
    rewrite(model, model__embed_tokens__weight=put(float("nan"), row=400))
    with pytest.raises(TameError, match=r"embed_tokens\.weight has nan at element 25605"):
        work(model, tmp_path / "out", Variant(method="nf4"), max_shard_size=60_000)


def test_a_row_of_zeros_is_no_fault(model: Path, tmp_path: Path) -> None:
    rewrite(model, **{Q: scaled(0)})
    assert work(model, tmp_path / "out", Variant(method="int8"))["digests"]


def test_a_tensor_that_the_model_needs_is_missing(model: Path, tmp_path: Path) -> None:
    header(model / "model.safetensors", lambda h: h.update({"model.layers.9.x.weight": h.pop(Q_PROJ)}))
    with pytest.raises(TameError, match=rf"no tensor for {Q_PROJ} \[64, 64\] of LlamaForCausalLM"):
        work(model, tmp_path / "out", NF4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]},
            "transformers cannot make a model of it",
        ),
        ({"architectures": ["NonesuchForCausalLM"], "model_type": "llama"}, None),
        ({"hidden_size": "wide"}, "transformers cannot make a model of it"),
    ],
)
def test_architectures_that_are_not_known(
    extra: dict[str, Any], message: str | None, model: Path, tmp_path: Path
) -> None:
    configured(**extra)(model)
    if message is None:  # the class has another name, the model type is known: as AutoModelForCausalLM does
        work(model, tmp_path / "out", NF4)
        return
    with pytest.raises(BadInputError, match=message):
        work(model, tmp_path / "out", NF4)


def test_no_space_left(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.quantize import command
    from tasks.quantize.protocols import Request

    def full(file: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(command, "spawned", lambda what, function, *args, **kwargs: function(*args, **kwargs))
    with pytest.raises(TameError, match=r"out: no space left \([\d.]+ GB free\); make room"):
        command.quantize_folder(Request(model, tmp_path / "out", NF4, "cpu"))
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" not in path.name or path.is_dir()) == ["model"]


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", "0"])
def test_a_shard_size_that_is_none(size: str) -> None:
    from tasks.quantize.command import parse_size

    with pytest.raises(BadInputError, match="--max-shard-size"):
        parse_size(size)
