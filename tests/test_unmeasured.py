"""`evaluate: null`: models that write no text are quantized and published, and every place says that nothing was measured."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs.errors import BadInputError
from configs.load import load_recipe
from configs.schema import Recipe, Variant
from flows.direct import DIRECT
from flows.pipeline import make
from tasks import formatting, sentences
from tasks import result as results
from tasks.plan import preflight
from tasks.report.html import render
from tasks.report.terminal import closing
from tasks.result import NOTHING_MEASURED, Result
from tasks.suggest import commented, suggest
from tests.models import VOCABULARY, quantize, tokenizer
from tests.test_quantize import assert_same, by_transformers, variant_of

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
REMEDY = "write evaluate: null into the recipe"


def other(folder: Path, kind: str) -> Path:
    """A tiny reward, embedding or encoder-decoder model, in `folder`."""
    import torch
    import transformers as t

    small = {**SMALL, "intermediate_size": 128, "pad_token_id": 0}
    made: dict[str, Any] = {
        "reward": lambda: t.Qwen3ForSequenceClassification(
            t.Qwen3Config(**small, num_key_value_heads=2, head_dim=16, num_labels=1)
        ),
        "embedding": lambda: t.BertModel(t.BertConfig(**small, max_position_embeddings=64)),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    made[kind]().to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if kind == "embedding":  # as sentence-transformers writes it
        (folder / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
        for part in ("1_Pooling", "2_Dense"):
            (folder / part).mkdir()
            (folder / part / "config.json").write_text("{}")
        (folder / "2_Dense" / "model.safetensors").write_bytes(b"a layer that is not quantized")
    return folder


def recipe(source: Path, **sections: Any) -> Recipe:
    variants = [{"method": "nf4", "compute_dtype": "float32"}]
    known = {"name": "r", "source": {"model": str(source)}, "variants": variants, "evaluate": None}
    return Recipe.model_validate({**known, "publish": {"to": "folder"}, **sections})


def released(asked: Recipe, out: Path) -> tuple[Result, list[str]]:
    said: list[str] = []
    return make(asked, out, results.begin(asked, None), DIRECT, say=said.append), said


def numbers(text: str) -> list[str]:
    return re.findall(r"(?i)perplexity|divergence|agreement|tokens/s|_per_second|accuracy", text)


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        ("reward", "gives scores, as reward models do"),
        ("embedding", r"makes embeddings \(modules.json"),
        ("t5", "encoder-decoder"),
    ],
)
def test_a_model_that_writes_no_text_goes_from_plan_to_a_published_folder(
    kind: str, refused: str, tmp_path: Path
) -> None:
    source, out = other(tmp_path / kind, kind), tmp_path / "out"
    measured = Recipe.model_validate({**recipe(source).model_dump(mode="json"), "evaluate": {"window": 32}})
    with pytest.raises(BadInputError, match=refused) as error:
        preflight(measured, out)
    assert REMEDY in str(error.value)
    assert "\n" not in str(error.value)

    result, said = released(recipe(source), out)
    (variant,) = result.variants
    assert (variant.status, variant.measured, variant.gate, variant.error) == ("published", False, None, None)
    assert result.exit_code == 0
    assert variant.metrics.keys() == {
        *("size_bytes", "bits_per_weight", "quantized_share", "weight_error_mean", "weight_error_max")
    }
    assert 0.05 < variant.metrics["weight_error_mean"] < 0.2
    assert result.baseline is not None
    assert result.baseline.metrics.keys() == {"size_bytes", "bits_per_weight"}
    assert any("not measured" in line and "quantized" in line for line in said)
    assert not any("baseline" in line for line in said)

    published = Path(str(variant.published))
    theirs = by_transformers(source, tmp_path / "theirs", variant_of("nf4"))
    assert_same(published, theirs)
    card = (published / "README.md").read_text()
    assert NOTHING_MEASURED in card
    assert numbers(card) == []
    assert "pipeline_tag" not in card
    program(card, published)
    if kind == "embedding":
        assert (published / "2_Dense" / "model.safetensors").read_bytes().startswith(b"a layer")
        assert (published / "1_Pooling" / "config.json").is_file()
    told = json.loads((published / "tame.json").read_text())
    assert (told["recipe"]["evaluate"], told["gate"], told["protocol"]) == (None, None, {})
    assert "evaluate: null" in card.split("## Reproduce")[1]


def program(card: str, published: Path) -> None:
    """The card's program runs, for what is where it says."""
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    place = code.split('from_pretrained("')[1].split('"')[0]
    exec(code.replace(f'"{place}"', repr(str(published))), {})


def test_every_place_says_that_it_was_not_measured(tmp_path: Path) -> None:
    from tasks.track import registry
    from tasks.track import task as track

    asked = recipe(other(tmp_path / "reward", "reward"), variants=[{"method": "nf4"}, {"method": "int8"}])
    asked = Recipe.model_validate({**asked.model_dump(), "publish": {"to": "nowhere"}})
    result, _ = released(asked, tmp_path / "out")
    again, said = released(asked, tmp_path / "out")
    assert again.variants[0].all_cached
    assert all("before" in line for line in said[1:])
    assert sentences.headline(result) == "Not measured: nf4; int8"
    assert sentences.advice(result).startswith(
        "Nobody knows what is good enough: it was not measured. The smallest is nf4"
    )
    shown = {
        "terminal": closing(result, tmp_path, 100, colour=False),
        "report": render(result),
        "markdown": sentences.markdown(result),
        "table": str(formatting.table(result)),
    }
    for place, text in shown.items():
        assert formatting.NOT_MEASURED in text, place
        assert "passed" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL), place
    assert numbers(re.sub(r"<style>.*?</style>", "", shown["report"], flags=re.DOTALL)) == []
    run = track.log(result, None, None, True)
    client = track.connection.connect()
    release = client.get_run(run)
    assert release.data.tags["verdict"] == formatting.NOT_MEASURED
    assert release.data.params["evaluate"] == formatting.NOT_MEASURED
    children = client.search_runs([release.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'")
    assert {child.data.tags.get("verdict") for child in children} == {None, formatting.NOT_MEASURED}
    assert not [name for child in children for name in child.data.metrics if numbers(name)]
    assert set(client.get_registered_model(registry.model_name(asked)).aliases) == {"newest"}  # and none is the best


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"gate": {"max_mean_kl": 0.1}}, "gate.max_mean_kl limits what is measured, and evaluate is null"),
        ({"gate": {"max_task_drop": 0.1}}, "gate.max_task_drop limits what is measured, and evaluate is null"),
        ({"variants": [{"method": "nf4", "fit": {"max_bytes": "1GB"}}]}, "variants.0.fit keeps what is measured"),
        ({"variants": [{"checkpoint": "a/b"}]}, "variants.0.checkpoint is there to be measured"),
    ],
    ids=str,
)
def test_what_needs_a_measurement_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(Path("model"), **sections)
    import jsonschema

    jsonschema.validate(recipe(Path("model")).model_dump(mode="json"), Recipe.model_json_schema())
    wrong = {**recipe(Path("model")).model_dump(mode="json"), **sections}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, Recipe.model_json_schema())


@pytest.mark.parametrize("calibrate", [True, "fast", "best"])
def test_only_a_language_model_can_be_calibrated(calibrate: Any, tmp_path: Path) -> None:
    asked = recipe(other(tmp_path / "m", "reward"), variants=[{"method": "nf4", "calibrate": calibrate}])
    with pytest.raises(BadInputError, match=r"Qwen3ForSequenceClassification: it gives scores.*leave them out"):
        preflight(asked, tmp_path / "out")


def test_a_head_that_transformers_does_not_know_is_not_lost(tmp_path: Path) -> None:
    source = other(tmp_path / "m", "reward")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForProcessRewardModel"]}))
    with pytest.raises(BadInputError, match="has no class Qwen3ForProcessRewardModel"):
        preflight(recipe(source), tmp_path / "out")


def test_a_part_of_an_embedding_model_that_is_pickled_is_refused(tmp_path: Path) -> None:
    source = other(tmp_path / "m", "embedding")
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(BadInputError, match=r"2_Dense/pytorch_model\.bin is pickled"):
        preflight(recipe(source), tmp_path / "out")


def test_a_language_model_may_be_calibrated_and_not_measured(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A text that is long enough for some sequences of sixteen tokens. " * 9)
    calibrated = {
        "variants": [{"method": "nf4", "calibrate": True}],
        "calibration": {"text": {"files": [str(tmp_path / "text.txt")]}, "sequences": 2, "length": 16},
    }
    assert preflight(recipe(tiny_llama, **calibrated), tmp_path / "out").text is None


@pytest.mark.parametrize("kind", ["reward", "embedding"])
def test_what_vllm_reads_is_made_of_them_too_and_runs(kind: str, tmp_path: Path) -> None:
    import torch
    import transformers

    from tasks.publish.load_check import loads

    source = other(tmp_path / "source", kind)
    written = quantize(source, tmp_path / "made", Variant(method="w4a16"))
    cls = getattr(transformers, json.loads((tmp_path / "made" / "config.json").read_text())["architectures"][0])
    ids = torch.arange(5, 14)[None]
    answers = []
    for folder in (source, tmp_path / "made"):
        model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            answers.append(model(input_ids=ids)[0].float())
    assert 0 < (answers[0] - answers[1]).abs().max() < 0.1
    assert loads(str(tmp_path / "made")) is None
    assert [entry.module for entry in written.left if entry.module.startswith("score")] == ["score.weight"] * (
        kind == "reward"
    )


@pytest.mark.parametrize("method", ["w4a16", "mxfp4"])
def test_a_packed_t5_is_refused_as_transformers_cannot_load_it(method: str, tmp_path: Path) -> None:
    source = other(tmp_path / "source", "t5")
    with pytest.raises(
        BadInputError, match=f"{method}: transformers cannot load T5ForConditionalGeneration in this format"
    ):
        quantize(source, tmp_path / "made", Variant(method=method))
    quantize(source, tmp_path / "fp8", Variant(method="fp8"))


@pytest.mark.parametrize("kind", ["reward", "embedding", "t5"])
def test_tame_init_writes_a_recipe_that_says_it(kind: str, tmp_path: Path) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(commented(suggest(str(other(tmp_path / kind, kind)))))
    asked = load_recipe(written)
    assert asked.evaluate is None
    assert preflight(asked, tmp_path / "out").text is None
