"""The decision: of what passed, the smallest; a larger one where it is surely less damaged."""

from typing import Any

import pytest

from configs.schema import Gate
from tasks import sentences
from tasks.decision import decide
from tasks.result import Result, ResultVariant
from tests.results import make


def release(*variants: tuple[str, float, Any], status: str = "passed", **gate: float) -> Result:
    """Variants (name, megabytes, mean KL or metrics) of a model of 1,000 MB; a KL is known to a tenth of itself."""
    whole = make()
    recipe = whole.recipe.model_copy(update={"gate": Gate(**(gate or {"max_mean_kl": 0.15}))})
    assert whole.baseline is not None
    rows = [
        ResultVariant(name=name, status=status, spec=recipe.variants[0], metrics={"size_bytes": size * 1e6, **metrics})
        for name, size, damage in variants
        for metrics in [damage if isinstance(damage, dict) else kl(damage)]
    ]
    baseline = whole.baseline.model_copy(update={"metrics": {"size_bytes": 1e9}})
    return whole.model_copy(update={"recipe": recipe, "variants": rows, "baseline": baseline})


def kl(value: float) -> dict[str, float]:
    return {"kl_mean": value, "kl_mean_low": 0.9 * value, "kl_mean_high": 1.1 * value}


def chosen(result: Result) -> list[tuple[str, str]]:
    return [(choice.name, choice.purpose) for choice in decide(result).choices]


def test_the_smallest_is_to_be_used_and_the_least_damaged_named() -> None:
    result = release(("int8", 610, 0.002), ("nf4", 430, 0.09), ("fp8", 620, 0.04))
    assert chosen(result) == [("nf4", "use"), ("int8", "closest")]  # fp8 is larger than int8 and worse
    assert sentences.advice(result) == (
        "Use nf4: 430.0 MB, 57 % smaller than the original, KL up to 0.0990 (limit 0.15); int8 if answers "
        "must be closest to the original's: 610.0 MB, 39 % smaller, KL up to 0.0022 (limit 0.15)."
    )


def test_between_the_two_are_those_that_no_other_beats() -> None:
    result = release(("a", 300, 0.1), ("b", 400, 0.05), ("c", 500, 0.06), ("d", 600, 0.01))
    assert chosen(result) == [("a", "use"), ("b", "between"), ("d", "closest")]


def test_a_larger_one_is_named_only_where_measuring_can_tell_it_apart() -> None:
    assert chosen(release(("a", 300, 0.100), ("b", 400, 0.095))) == [("a", "use")]  # 0.090 to 0.110, 0.0855 to 0.1045
    assert chosen(release(("a", 300, 0.100), ("b", 400, 0.081))) == [("a", "use"), ("b", "closest")]  # up to 0.0891


def test_a_little_more_size_is_given_for_much_less_damage() -> None:
    others = (("nf4-dq", 112, 0.26), ("int8", 164, 0.02))
    assert chosen(release(*others, ("cal", 117, 0.05), max_mean_kl=0.6)) == [("cal", "use"), ("int8", "closest")]
    assert chosen(release(*others, ("cal", 119, 0.05), max_mean_kl=0.6))[0] == ("nf4-dq", "use")  # 6 % larger
    assert chosen(release(*others, ("nf4", 117, 0.255), max_mean_kl=0.6))[0] == ("nf4-dq", "use")  # as damaged
    nearest = release(*others, ("a", 115, 0.1), ("b", 117, 0.05), max_mean_kl=0.6)
    assert chosen(nearest) == [("b", "use"), ("int8", "closest")]


def test_equal_ones_are_named_once() -> None:
    assert chosen(release(("a", 300, 0.1), ("b", 300, 0.1), ("c", 300, 0.02))) == [("c", "use")]
    assert chosen(release(("a", 300, 0.1), ("b", 300, 0.1))) == [("a", "use")]


@pytest.mark.parametrize("status", ["rejected", "failed"])
def test_what_did_not_pass_is_never_named(status: str) -> None:
    result = release(("int8", 610, 0.002), ("nf4", 430, 0.09), status=status)
    assert decide(result).choices == []
    assert sentences.advice(result) == "Use none of these: no variant passed."


def test_without_a_limit_nothing_is_recommended() -> None:
    result = release(("nf4", 430, 0.09), max_mean_kl=None)
    assert not decide(result).judged
    assert sentences.advice(result) == (
        "No limit was set, so that nobody knows what is good enough. The smallest is nf4: 430.0 MB, "
        "57 % smaller than the original, KL up to 0.0990."
    )


def test_damage_is_the_ratio_where_the_divergence_is_not_known_of_all() -> None:
    ratios = [
        {"perplexity_ratio": 1.0 + p, "perplexity_ratio_low": 1 + p, "perplexity_ratio_high": 1 + p}
        for p in (0.04, 0.01)
    ]
    result = release(("a", 300, ratios[0] | kl(0.1)), ("b", 400, ratios[1]), max_perplexity_increase=0.05)
    assert sentences.advice(result) == (
        "Use a: 300.0 MB, 70 % smaller than the original, perplexity ratio up to 1.0400 (limit 1.05); b if answers must be "
        "closest to the original's: 400.0 MB, 60 % smaller, perplexity ratio up to 1.0100 (limit 1.05)."
    )
    unknown = release(("a", 300, {}), ("b", 400, {"kl_mean": float("nan")}))
    assert sentences.advice(unknown) == "Use a: 300.0 MB, 70 % smaller than the original."


def test_larger_than_the_original_and_an_unmeasured_original() -> None:
    assert "1.20 GB, 20 % larger than the original" in sentences.advice(release(("a", 1200, 0.1)))
    unpacked = release(("a", 300, 0.1))
    gguf = unpacked.source.model_copy(update={"model": "me/a/a.Q4_1.GGUF"})
    assert unpacked.baseline is not None
    whole = unpacked.baseline.model_copy(update={"metrics": {"size_bytes": 1e9, "bits_per_weight": 16.002}})
    unpacked = unpacked.model_copy(update={"source": gguf, "baseline": whole})
    assert "300.0 MB, 70 % smaller than the original in 16 bits," in sentences.advice(
        unpacked
    )  # not than the GGUF file
    alone = release(("a", 300, 0.1)).model_copy(update={"baseline": None})
    assert sentences.advice(alone) == "Use a: 300.0 MB, KL up to 0.1100 (limit 0.15)."
