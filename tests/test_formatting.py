import math

import pytest

from configs.schema import Gate
from tasks import formatting, sentences
from tasks.formatting import figure, label, span
from tests.results import make


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("size_bytes", 1349983600, "1.35 GB"),
        ("size_bytes", 116548186, "116.5 MB"),
        ("perplexity", 25.50449, "25.504"),
        ("perplexity_high", 12345.6789, "12,345.679"),
        ("perplexity_ratio", 1.20811, "1.2081"),
        ("kl_mean", 0.26160, "0.2616"),
        ("kl_mean_low", 0.0, "0.0000"),
        ("kl_mean", 0.0000213, "2.1e-05"),
        ("kl_mean", 0.000131, "0.00013"),
        ("floor_kl_mean", 0.0000213, "2.1e-05"),
        ("floor_kl_mean", -9.5e-09, "< 1e-6"),
        ("floor_kl_mean", -1.7e-06, "< 1e-6"),
        ("kl_mean", -0.5, "-0.5000"),
        ("kl_mean_low", 9.9e-07, "< 1e-6"),
        ("kl_max", 1e-06, "1e-06"),
        ("kl_mean", 0.0, "0.0000"),
        ("top1_agreement", 0.89969, "89.97 %"),
        ("quantized_share", 1, "100.00 %"),
        ("bits_per_weight", 4.127, "4.13"),
        ("load_seconds", 1.234, "1.23 s"),
        ("prefill_tokens_per_second", 101128.4, "101,000"),
        ("decode_tokens_per_second", 9.996, "10.00"),
        ("decode_tokens_per_second", 0.01234, "0.0123"),
        ("task/piqa/acc_norm", 0.635, "63.50 %"),
        ("task/a/b/acc_difference_low", -0.0723, "−7.23 points"),
        ("task/piqa/flips", 18.0, "18"),
        ("task/piqa/floor_flips", 0.01, "1.00 %"),
        ("task/piqa/acc_p", 0.0000001, "<0.001"),
        ("task/lambada/perplexity", 12.5, "12.500"),
        ("kl_mean", None, "–"),
        ("kl_mean", math.nan, "not finite"),
    ],
)
def test_figure(name: str, value: float | None, shown: str) -> None:
    assert figure(name, value) == shown


def test_labels_name_the_unit_that_the_figure_leaves_out() -> None:
    assert label("kl_p99") == "KL divergence, 99th percentile (nats)"
    assert label("decode_tokens_per_second") == "Decode (tokens/s)"
    assert label("task/a/b/acc_difference") == "a/b: acc difference"
    assert label("task/piqa/acc_norm_p") == "piqa: acc_norm, McNemar's p"
    assert label("never_heard_of") == "never heard of"
    assert span("kl_mean", {"kl_mean_low": 0.0171, "kl_mean_high": 0.0209}) == "0.0171 to 0.0209"
    assert span("kl_mean", {"kl_mean_low": 0.0171}) == ""


def test_ends_of_intervals_are_not_points() -> None:
    names = formatting.points([row.metrics for row in formatting.rows(make())])
    assert names[:4] == ["size_bytes", "bits_per_weight", "quantized_share", "perplexity"]
    assert not [name for name in names if name.endswith(("_low", "_high"))]
    assert names[-1].startswith("task/")


def test_headline_says_the_worst_first_and_why() -> None:
    result = make()
    reasons = "KL up to 0.2741 > limit 0.1, top-1 agreement down to 70.30 % < limit 90 %"
    killed = result.variants[2].error
    assert sentences.headline(result) == f"Failed: fp4 ({killed}). Rejected: nf4-dq ({reasons}). Published: int8"
    assert sentences.outcome(result) == "Failed"
    two = result.model_copy(update={"variants": result.variants[:2]})
    assert sentences.headline(two).startswith("Rejected: nf4-dq (KL up to 0.2741 > limit 0.1")
    assert sentences.outcome(two.model_copy(update={"variants": two.variants[:1]})) == "Published"


def test_a_short_name_says_what_to_use_and_how_the_variants_fared() -> None:
    result = make()
    assert (
        sentences.short(result)
        == "use int8 (39 % smaller than the original, KL up to 0.0209) – 1 published, 1 rejected, 1 failed"
    )
    one = result.model_copy(update={"variants": result.variants[:1]})
    assert sentences.short(one).endswith("– passed")
    none = result.model_copy(update={"variants": result.variants[1:2]})
    assert sentences.short(none) == "use none – rejected"
    assert sentences.short(result.model_copy(update={"error": "no space"})) == "failed"


@pytest.mark.parametrize(
    ("statuses", "name"),
    [
        ({"published"}, "Completed"),
        ({"passed", "measured"}, "Completed"),
        ({"published", "rejected"}, "Partly rejected"),
        ({"passed", "rejected", "measured"}, "Partly rejected"),
        ({"rejected"}, "Rejected"),
        ({"rejected", "measured", "baseline"}, "Rejected"),
    ],
)
def test_a_run_is_rejected_only_where_nothing_passed(statuses: set[str], name: str) -> None:
    assert sentences.ending(statuses) == name


def test_a_run_that_ended_early_says_so_once() -> None:
    result = make()
    stopped = [variant.model_copy(update={"status": "failed", "error": "no such model"}) for variant in result.variants]
    ended = result.model_copy(update={"variants": stopped, "error": "no such model"})
    assert sentences.headline(ended) == "Failed: no such model"


def test_markdown_marks_the_variant_to_use_where_a_limit_was_set() -> None:
    result = make()
    assert "| **int8** | published |" in sentences.markdown(result)
    unlimited = result.model_copy(update={"recipe": result.recipe.model_copy(update={"gate": Gate()})})
    assert "**int8**" not in sentences.markdown(unlimited)


def test_markdown_shows_untrusted_text_as_text() -> None:
    result = make()
    hostile = result.variants[2].model_copy(update={"name": "a|b", "error": "<img src=x>\n# no [x](javascript:y) `z`"})
    text = sentences.markdown(result.model_copy(update={"variants": [*result.variants[:2], hostile]}))
    assert "a\\|b" in text
    assert "\\<img src=x\\> \\# no \\[x\\](javascript:y) \\`z\\`" in text
    assert "<img" not in text.replace("\\<img", "")
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {9}
