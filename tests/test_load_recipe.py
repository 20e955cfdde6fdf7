"""Recipes: what is taken, what is refused, and how it is said."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.errors import BadInputError
from configs.load import load_recipe
from configs.schema import Recipe

SHIPPED = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = {"name": "a", "source": {"model": "x"}, "variants": [{"method": "nf4"}]}


def refused(tmp_path: Path, text: str | bytes, *settings: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadInputError) as error:
        load_recipe(path, list(settings))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_begin_with_their_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("#")
    assert first.endswith(f"tame run configs/{path.name}")
    recipe = load_recipe(path)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the recipe is empty"),
        ("- a\n- b", "the recipe is a list"),
        ("just words", "the recipe is a text"),
        ("a: !!python/object/apply:os.system [ls]", "line 1"),
        ("a: &x [1, 2]\nb: *x", "anchors and aliases are not taken"),
        ("a: 1\na: 2", "line 2: the key 'a' stands twice"),
        ("? [1]\n: 2", "line 1"),
        ("a: [", "line 1"),
        ("{" * 3000, "nested too deeply"),
        (b"name: \xff\xfe\xfa", "UTF-8"),
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("gat.max_mean_kl=1", "gat is not a key of a recipe; did you mean gate?"),
        ("evaluate.windw=512", "evaluate.windw is not a key of a recipe; did you mean window?"),
        ("gate.max_mean_kl=.nan", "gate.max_mean_kl is nan: input should be a finite number"),
        ("gate.max_mean_kl=-0.1", "gate.max_mean_kl is -0.1: input should be greater than or equal to 0"),
        ("gate.min_top1_agreement=1.5", "less than or equal to 1"),
        ("gate.max_task_drop=0.1", "gate.max_task_drop needs evaluate.tasks"),
        ('evaluate.window="512"', "evaluate.window is '512': input should be a valid integer"),
        ("evaluate.window=true", "evaluate.window is True"),
        ("evaluate.max_tokens=100", "less than one window"),
        ("source.revision=12345", "source.revision is 12345: input should be a valid string; write it in quotes"),
        ("variants=[]", "variants is []"),
        ("variants.0.method=int4", "variants.0.method is 'int4'"),
        ("variants.0={method: int8, double_quant: true}", "double_quant belongs to the 4-bit methods"),
        ("variants.1={method: nf4}", "variants.1 is the same as variants.0"),
        ("variants.1={method: nf4, name: other}", "variants.1 is the same as variants.0"),
        ("variants.1={method: nf4, compute_dtype: float16}", "both named 'nf4'; give one a name"),
        ("variants.5.method=nf4", "variants is a list of 1"),
        ("name=../up", "name is '../up'"),
        ("publish={to: hub, repo: ../x}", "not a Hub repo id"),
        ("publish={to: hub, repo: 'me/{modl}'}", "{modl}"),
        ("evaluate.text={files: [a], builtin: python-docs}", "exactly one of"),
        ("nonsense", "expected KEY=VALUE"),
        ("name.deeper=1", "which has no keys"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_its_path(tmp_path: Path, setting: str, said: str) -> None:
    assert said in refused(tmp_path, str(MINIMAL), setting)


def test_settings_reach_every_key(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(str(MINIMAL))
    recipe = load_recipe(
        path, ["gate.max_mean_kl=2e-1", "variants.1={method: int8}", "evaluate.speed=null", "variants.0.name=four"]
    )
    assert recipe.gate.max_mean_kl == 0.2
    assert [variant.label for variant in recipe.variants] == ["four", "int8"]
    assert recipe.evaluate.speed is None


def test_names_are_derived_from_the_method() -> None:
    variants = [
        {"method": m, "double_quant": d} for m, d in (("nf4", True), ("fp4", True), ("fp4", False), ("int8", False))
    ]
    recipe = Recipe.model_validate({**MINIMAL, "variants": variants})
    assert [variant.label for variant in recipe.variants] == ["nf4-dq", "fp4-dq", "fp4", "int8"]


def test_the_schema_makes_a_form() -> None:
    def fields(model: dict[str, object]) -> None:
        for key, field in model.get("properties", {}).items():  # type: ignore[attr-defined]
            assert "description" in field or "$ref" in field, key

    schema = Recipe.model_json_schema()
    for definition in [schema, *schema["$defs"].values()]:
        fields(definition)
    with pytest.raises(ValidationError):
        Recipe.model_validate({**MINIMAL, "name": "a" * 200})
