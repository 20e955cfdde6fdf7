"""The gate: the pessimistic end of every interval, at the limit and beyond it."""

import math

import pytest

from configs.schema import Gate
from tasks.formatting import figure
from tasks.gate import judge

METRICS = {
    "perplexity_ratio": 1.04, "perplexity_ratio_low": 1.02, "perplexity_ratio_high": 1.06,
    "kl_mean": 0.09, "kl_mean_low": 0.08, "kl_mean_high": 0.11,
    "top1_agreement": 0.91, "top1_agreement_low": 0.89, "top1_agreement_high": 0.93,
    "task/piqa/acc_difference": -0.01, "task/piqa/acc_difference_low": -0.03, "task/piqa/acc_difference_high": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "kept", "broken", "shown"),
    [
        ("max_perplexity_increase", 0.0601, 0.05, "perplexity increase up to 6.00 % > limit 5 %"),
        ("max_mean_kl", 0.11, 0.10, "KL up to 0.1100 > limit 0.1"),
        ("min_top1_agreement", 0.89, 0.90, "top-1 agreement down to 89.00 % < limit 90 %"),
        ("max_task_drop", 0.03, 0.02, "piqa acc drop up to 3.00 points > limit 2 points"),
    ],
)
def test_limits_are_judged_on_the_pessimistic_end(limit: str, kept: float, broken: float, shown: str) -> None:
    assert judge(METRICS, Gate(**{limit: kept})).passed
    verdict = judge(METRICS, Gate(**{limit: broken}))
    assert not verdict.passed
    assert len(verdict.reasons) == 1
    assert shown in verdict.reasons[0]


def test_a_gate_without_limits_passes_everything() -> None:
    assert judge({}, Gate()).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_was_not_measured_does_not_pass(value: float | None) -> None:
    metrics = {} if value is None else {"kl_mean": value}
    verdict = judge(metrics, Gate(max_mean_kl=1e300))
    assert not verdict.passed
    assert "not measured" in verdict.reasons[0]
    assert not judge({}, Gate(max_task_drop=1.0)).passed


def test_what_is_nothing_but_rounding_is_told_as_such() -> None:
    assert judge({"kl_mean": -9.5e-09}, Gate(max_mean_kl=0.1)).checked == ["KL < 1e-6 ≤ limit 0.1"]


def test_tasks_are_judged_by_their_differences_and_missed_where_there_is_none() -> None:
    metrics = METRICS | {
        "task/a/b/acc": 0.5,
        "task/piqa/acc_p": 0.4,
        "task/piqa/flips": 3.0,
        "task/piqa/acc_norm_difference": 0.01,
    }
    verdict = judge(metrics, Gate(max_task_drop=0.05))
    assert verdict.checked == [
        "piqa acc drop up to 3.00 points ≤ limit 5 points",
        "piqa acc_norm drop −1.00 points ≤ limit 5 points",
    ]
    assert verdict.reasons == ["a/b drop was not measured (limit 0.05)"]


def test_all_broken_limits_are_named() -> None:
    verdict = judge(METRICS, Gate(max_mean_kl=0.01, min_top1_agreement=0.99, max_perplexity_increase=0.5))
    assert [reason.split()[0] for reason in verdict.reasons] == ["KL", "top-1"]
    assert verdict.checked == ["perplexity increase up to 6.00 % ≤ limit 50 %"]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.100004, "KL 0.100004 > limit 0.1"), (0.1, "KL 0.1000 ≤ limit 0.1"), (0.0999996, "KL 0.0999996 ≤ limit 0.1")],
)
def test_a_number_beside_its_limit_shows_on_which_side_it_is(value: float, said: str) -> None:
    verdict = judge({"kl_mean": value}, Gate(max_mean_kl=0.1))
    assert verdict.reasons + verdict.checked == [said]


def test_a_number_has_as_many_digits_as_everywhere_else() -> None:
    rates = {"perplexity_ratio": 1.040123, "kl_mean": 0.071041, "top1_agreement": 0.863512}
    limits = Gate(max_perplexity_increase=0.05, max_mean_kl=0.35, min_top1_agreement=0.8)
    assert judge(rates, limits).checked == [
        "perplexity increase 4.01 % ≤ limit 5 %",
        f"KL {figure('kl_mean', 0.071041)} ≤ limit 0.35",
        f"top-1 agreement {figure('top1_agreement', 0.863512)} ≥ limit 80 %",
    ]
