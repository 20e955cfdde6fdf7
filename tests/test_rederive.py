"""Tensors of a release computed again from its source, over a real Hub's range requests and in folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.publish.rederive import Rederived, _rederive
from tasks.runtime.progress import silent
from tests.hub import Hub
from tests.models import quantize, tiny, zoo

DQ = Variant(method="nf4", double_quant=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tame_home: Path) -> Iterator[Hub]:
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token())
        yield hub


def released(source: Path, out: Path, variant: Variant, **more: Any) -> Path:
    """A release of `source` in `out`, with what its tame.json must say to be computed again."""
    out.mkdir()
    quantize(source, out, variant, max_shard_size=100_000)
    told = {
        "source": {"model": str(source), "commit": None, **more},
        "variant": {"spec": variant.model_dump(mode="json")},
    }
    (out / "tame.json").write_text(json.dumps(told))
    return out


def again(release: Path | str, source: Path | str | None = None, count: int = 10_000) -> Rederived:
    return _rederive(str(release), count, None if source is None else str(source), silent)


def test_a_release_on_the_hub_is_read_in_parts_and_found_the_same(
    hub: Hub, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tame

    source = hub.add_model("org/tiny", tiny_llama)
    made = released(tiny_llama, tmp_path / "made", DQ, model="org/tiny", commit=source.at("main"))
    hub.add_model("me/tiny-nf4", made)
    with pytest.raises(SystemExit) as ended:
        tame.main(["publish", "--check", "me/tiny-nf4", "--rederive", "3"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    assert f"computed again from org/tiny at {str(source.at('main'))[:12]}, are the same, byte for byte" in said.out
    whole = sum((tiny_llama / file).stat().st_size for file in ("model.safetensors",))
    found = again("me/tiny-nf4", count=1)
    assert not found.problems
    assert 0 < found.source_bytes < whole
    everything = again("me/tiny-nf4")
    assert not everything.problems
    assert set(everything.checked) == set(names_in(made))
    assert everything.of == len(everything.checked)


def names_in(folder: Path) -> list[str]:
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += opened.keys()
    return names


def where(folder: Path, name: str) -> tuple[Path, int]:
    """The file of a tensor of a quantized checkpoint, and the byte where it begins."""
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if name in header:
            return file, 8 + length + int(header[name]["data_offsets"][0])
    raise AssertionError(name)


@pytest.mark.parametrize(
    "part",
    ["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map"],
)
def test_a_changed_byte_is_found_in_codes_and_in_scales(part: str, tiny_llama: Path, tmp_path: Path) -> None:
    made = released(tiny_llama, tmp_path / "made", DQ)
    name = f"model.layers.1.mlp.up_proj.{part}"
    file, at = where(made, name)
    data = bytearray(file.read_bytes())
    data[at + 1] ^= 1
    file.write_bytes(data)
    assert again(made, tiny_llama).problems == [
        f"{name} differs from what model.layers.1.mlp.up_proj.weight gives, first at byte 1"
    ]


def test_a_release_of_another_source_is_found(tiny_llama: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", seed=7)
    made = released(tiny_llama, tmp_path / "made", Variant(method="int8"))
    found = again(made, other, count=5)
    assert any("differs from what" in problem for problem in found.problems)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0, "vocab_size": 7}))
    assert "config.json: vocab_size is not what the source gives" in again(made, tiny_llama, count=1).problems


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("gpt2", Variant(method="nf4")),
        ("qwen3-moe", Variant(method="w4a16", group_size=32)),
        ("llama", Variant(method="nf4", double_quant=True, small_group_modules=["model.layers.1.mlp.down_proj"])),
    ],
    ids=["transposed", "experts", "small groups"],
)
def test_transposed_weights_and_experts_are_computed_again(name: str, variant: Variant, tmp_path: Path) -> None:
    source = tiny(tmp_path / name, zoo(name))
    made = released(source, tmp_path / "made", variant)
    found = again(made, source)
    assert (found.problems, found.of) == ([], len(found.checked))


def test_of_a_calibrated_release_what_is_copied_is_compared_and_that_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    made = released(tiny_llama, tmp_path / "made", Variant(method="nf4"))
    told = json.loads((made / "tame.json").read_text())
    told["variant"]["spec"]["calibrate"] = True
    (made / "tame.json").write_text(json.dumps(told))
    found = again(made, tiny_llama)
    assert found.problems == []
    assert not any("absmax" in name for name in found.checked)
    assert "its codes were calibrated" in found.lines("it")[-1]


def test_what_cannot_be_computed_again_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    made = released(tiny_llama, tmp_path / "made", DQ)
    with pytest.raises(BadInputError, match="which is no repo of the Hub; name a folder"):
        again(made)
    with pytest.raises(BadInputError, match=r"there is no tame\.json"):
        again(tiny_llama)
    (made / "tame.json").write_text("{}")
    with pytest.raises(BadInputError, match="names no source"):
        again(made)
    shutil.rmtree(made)


def test_a_release_with_an_adapter_is_not_compared_with_its_base_alone(tiny_llama: Path, tmp_path: Path) -> None:
    made = released(tiny_llama, tmp_path / "made", DQ, commit="a" * 40, adapter={"model": "me/lora", "commit": None})
    with pytest.raises(BadInputError, match="with the adapter me/lora merged into it; merge it, and name the folder"):
        again(made)
    assert again(made, tiny_llama, count=1).problems == []
