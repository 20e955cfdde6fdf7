"""The names of numbers, taken apart."""

import pytest

from tasks import metrics
from tasks.metrics import Metric
from tests.results import BASELINE, INT8


def test_a_metric_has_its_interval_and_what_is_not_one_is_a_metric() -> None:
    flat = {"kl_mean": 0.02, "kl_mean_low": 0.01, "kl_mean_high": 0.03, "kl_max": 1.0, "odd_low": 7.0}
    read = metrics.read(flat)
    assert list(read) == ["kl_mean", "kl_max", "odd_low"]
    assert read["kl_mean"] == Metric("kl_mean", 0.02, 0.01, 0.03, "nats", False)
    assert read["kl_max"] == Metric("kl_max", 1.0, None, None, "nats", False)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("perplexity", (None, "perplexity", "value")),
        ("floor_kl_mean", (None, "kl_mean", "floor")),
        ("task/piqa/acc", ("piqa", "acc", "value")),
        ("task/a/b/acc_difference", ("a/b", "acc", "difference")),
        ("task/gsm8k/exact_match,strict-match_p", ("gsm8k", "exact_match,strict-match", "p")),
        ("task/piqa/floor_flips", ("piqa", "flips", "floor")),
    ],
)
def test_names_are_taken_apart(name: str, parts: tuple[str | None, str, str]) -> None:
    assert metrics.parse(name) == parts


def test_every_number_of_a_result_has_a_unit_and_belongs_to_the_run_or_to_the_files() -> None:
    read = metrics.read(BASELINE) | metrics.read(INT8)
    assert {name for name, metric in read.items() if metric.measured} == {
        "load_seconds",
        "peak_memory_bytes",
        "time_to_first_token_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert {name for name, metric in read.items() if metric.unit == "number"} == {"perplexity"}
    assert [name for name in read if metrics.is_score(name)] == ["task/piqa/acc"]
    assert metrics.difference("perplexity") in read
