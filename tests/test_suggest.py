"""What `tame init` proposes for a machine: a variant that is fitted, as a comment that only has to be uncommented."""

import re
from pathlib import Path

import pytest

from configs.errors import BadInputError
from configs.load import load_recipe
from configs.schema import Fit, Variant
from tasks import suggest as suggestions
from tasks.suggest import commented, suggest
from tests.models import tiny, zoo


@pytest.mark.parametrize(
    ("room", "fit"),
    [
        (10.0, Fit(max_mean_kl=0.05)),  # the original fits in easily
        (0.8, Fit(max_bytes="246KB")),  # it does not, and 4 bits do
        (0.1, None),
    ],
)
def test_a_fit_to_the_machines_memory_is_proposed(
    room: float, fit: Fit | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path / "model")
    suggestion = suggest(str(model))
    memory = int(room * 2 * suggestion.facts.parameters / suggestions.FREE)
    monkeypatch.setattr(suggestions, "_memory", lambda: memory)
    text = commented(suggestion)
    if fit is None:
        assert re.search(r"# In 4 bits it takes about \S+ \S+, and this machine has room for ", text)
        assert "fit: {" not in text
        return
    uncommented = re.sub(r"^# (- \{method: nf4.*)$", r"\1", text, flags=re.MULTILINE)
    assert uncommented != text
    file = tmp_path / "recipe.yaml"
    file.write_text(uncommented)
    recipe = load_recipe(file)
    assert [variant.label for variant in recipe.variants] == ["nf4-cal", "int8", "nf4-dq-g32-cal", "nf4-cal-fit"]
    found = recipe.variants[3].fit
    assert isinstance(found, Fit)
    if fit.max_mean_kl:
        assert found == fit
    else:
        assert found.bytes
        assert 0.9 * memory * suggestions.FREE < found.bytes <= memory * suggestions.FREE


def test_none_is_proposed_for_a_mixture_of_experts(tmp_path: Path) -> None:
    assert "fit: {" not in commented(suggest(str(tiny(tmp_path / "model", zoo("qwen3-moe")))))


def test_formats_are_asked_for_by_the_names_that_results_have(tiny_llama: Path) -> None:
    asked = ("nf4-dq-cal-fast", "w4a16-g64-cal", "w8a16-row-search", "fp8-block-search")
    made = suggest(str(tiny_llama), to=",".join(asked)).recipe["variants"]
    assert tuple(Variant.model_validate(one).label for one in made) == asked
    with pytest.raises(BadInputError, match="after fp8, there are -dq, -cal, -g64, -row and -search"):
        suggest(str(tiny_llama), to="fp8-bloc")
