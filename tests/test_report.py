import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from configs.schema import Recipe
from tasks import formatting
from tasks.evaluate import evidence
from tasks.report import html as report
from tasks.report import plots
from tasks.result import Result, ResultVariant
from tasks.track import mlflow_runs
from tasks.values import Sample
from tests.results import LEFT, PROTOCOL, RECIPE, make

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements, ids and addresses of a page; fails on tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.handle_attributes(dict(attributes))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handle_attributes(dict(attributes))

    def handle_attributes(self, attributes: dict[str, str | None]) -> None:
        assert not [name for name in attributes if name.startswith("on")], "an event handler"
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        self.addresses += [value or "" for name, value in attributes.items() if name in ("href", "src", "xlink:href")]
        self.references += re.findall(r"url\(#([^)]*)\)", " ".join(value or "" for value in attributes.values()))
        self.references += (attributes.get("aria-labelledby") or "").split()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.cells and self.open and self.open[-1] in ("td", "th", "span"):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return make(tmp_path_factory.mktemp("evidence"))


@pytest.fixture(scope="module")
def html(result: Result) -> str:
    return report.render(result)


def test_same_result_same_bytes(result: Result, html: str) -> None:
    assert report.render(result) == html


def test_every_number_is_the_result_s(result: Result, html: str) -> None:
    page = Page(html)
    for row in formatting.rows(result):
        for name in formatting.points([row.metrics]):
            assert formatting.figure(name, row.metrics[name]) in page.cells
            assert formatting.label(name) in page.cells
            if interval := formatting.span(name, row.metrics):
                assert interval in page.text


def test_verdict_comes_first_and_nothing_is_left_out(html: str) -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(html).text))
    order = [
        "SmolLM2-135M-Instruct, quantized",
        "Use int8: 163.6 MB, 39 % smaller than the original, KL up to 0.0209 (limit 0.1).",
        "Rejected: nf4-dq (KL up to 0.2741 > limit 0.1",
        "KL (KL divergence) is how far a variant's probabilities for the next token are from the original's: 0 means the same.",
        "Numbers",
        "What it cost in quality",
        "Which layers it hurt",
        "Speed and memory",
        "Answers side by side",
    ]
    order += [
        "What was left unquantized",
        "model.embed_tokens",
        "How it was measured",
        "Where it comes from",
        "How to make it again",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "the process was killed (signal 9)" in text
    assert "12fd25f77366fa6b3b4b768ec3050bf629380bac" in text


def test_one_file_without_requests_or_scripts(html: str) -> None:
    page = Page(html)
    assert "script" not in page.tags
    assert [address for address in page.addresses if not address.startswith(("#", "https://huggingface.co/me/"))] == []
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.references) <= set(page.ids)
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)


def test_plots_follow_the_page_s_colours_and_have_words(html: str) -> None:
    assert html.count("<svg ") == html.count('role="img" aria-label=') == 10
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b", drawn) == []
    words = re.findall(r'aria-label="([^"]*)"', html)
    assert any("nf4-dq 111.9 MB, 0.2616" in words for words in words)
    assert any("nf4-dq by depth: q_proj 8.73 % to 9.72 %, most at depth 0; k_proj" in words for words in words)


def test_plots_are_files_of_their_own(html: str) -> None:
    files = mlflow_runs.plots_of(html)
    assert {
        "judged-kl_mean.svg",
        "judged-perplexity_ratio.svg",
        "windows.svg",
        "layers-nf4-dq.svg",
        "bars-load_seconds.svg",
    } <= files.keys()
    assert len(files) == 10
    for svg in files.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        used, known = re.findall(r"var\((--[\w]+)\)", svg), re.findall(r"(--[\w]+):", svg)
        assert set(used) <= set(known)
        assert not re.search(r"https?://(?!www\.w3\.org/)", svg)
    assert mlflow_runs.plots_of("<!doctype html>") == {}


def test_the_most_changed_layers_come_first(result: Result, html: str) -> None:
    named = re.findall(r"<code>(model\.layers[^<]*)</code> ([\d.]+ %)", html)
    assert len(named) == 2 * 10
    found = sorted(evidence.layers(result.variants[1].evidence), key=lambda layer: -layer.error)
    assert named[1::2] == [(layer.module, f"{100 * layer.error:.2f} %") for layer in found[:10]]


def test_many_kinds_of_layers_are_drawn_as_the_largest(result: Result, tmp_path: Path) -> None:
    rows = [
        {"module": f"model.layers.{depth}.kind_{i}", "error": 0.1, "parameters": 100 + i}
        for depth in range(2)
        for i in range(11)
    ]
    (tmp_path / "layers.json").write_text(json.dumps(rows))
    drawn = plots.layers(result.variants[0].model_copy(update={"evidence": str(tmp_path)}))
    assert drawn is not None
    assert "The 8 largest of 11 kinds." in drawn[1]
    assert ("kind_10 " in drawn[1], "kind_2 " in drawn[1]) == (True, False)


def test_what_models_and_names_say_is_text(result: Result) -> None:
    hostile = "</td><script>alert(1)</script><img src=x onerror=alert(1)>"
    variant = result.variants[0]
    samples = [Sample(prompt=hostile, baseline=hostile, answer=hostile + "!", diverges_at=len(hostile))]
    variant = variant.model_copy(
        update={"name": hostile, "samples": samples, "notes": [hostile], "published": "javascript:alert(1)"}
    )
    source = result.source.model_copy(update={"model": f"me/{hostile}", "licence": hostile})
    page = Page(
        report.render(
            result.model_copy(update={"variants": [variant], "source": source, "versions": {hostile: hostile}})
        )
    )
    assert not {"script", "img"} & set(page.tags)
    assert page.addresses == [address for address in page.addresses if address.startswith("#")]
    assert any("alert(1)" in text for text in page.text)


def test_answers_that_changed_are_named(result: Result) -> None:
    nf4 = evidence.flips(result.baseline and result.baseline.evidence, result.variants[1].evidence)
    assert nf4 == [("piqa", list(range(10)), [])]
    back = evidence.flips(result.variants[1].evidence, result.baseline and result.baseline.evidence)
    assert back == [("piqa", [], list(range(10)))]
    page = Page(report.render(result))
    cells, text = page.cells, " ".join(" ".join(page.text).split())
    answers = "baseline right Turn the lid anticlockwise. nf4-dq wrong Turn the jar anticlockwise"
    assert f"How do you open jar number 4 <without> tools? Answer: {answers}" in text
    assert "jar number 5" not in text
    assert "10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in cells
    assert evidence.flips(None, result.variants[1].evidence) == []
    shown = [evidence.Example(number, number < 10, "", None, None, None) for number in range(20)]
    assert [item.doc_id for item in report._some(shown)] == [0, 1, 2, 10, 11]
    assert [item.doc_id for item in report._some(shown[9:])] == [9, 10, 11, 12, 13]


def test_the_recipe_to_make_it_again_is_pinned(html: str) -> None:
    import html as entities

    recipe = yaml.safe_load(entities.unescape(re.findall(r"<pre[^>]*>(.*?)</pre>", html, re.DOTALL)[0]))
    assert recipe["source"]["revision"] == "12fd25f77366fa6b3b4b768ec3050bf629380bac"
    assert Recipe.model_validate(recipe).variants[1].label == "nf4-dq"


def test_in_json_a_result_is_what_was_put_in(result: Result) -> None:
    content = json.loads(result.model_dump_json())
    assert content["recipe"] == Recipe.model_validate(RECIPE).model_dump(mode="json")
    assert (content["baseline"]["protocol"], content["variants"][1]["protocol"]) == (PROTOCOL, PROTOCOL)
    assert (content["variants"][2]["protocol"], content["variants"][1]["left"]) == ({}, LEFT)
    assert list(content["variants"][0]["samples"][0]) == [
        "prompt",
        "baseline",
        "answer",
        "diverges_at",
        "baseline_thought",
        "thought",
    ]
    assert content["variants"][1]["spec"]["double_quant"] is True
    assert Result.model_validate(content) == result


def test_first_divergence_is_marked(html: str) -> None:
    assert 'It <mark><span class="hidden">first difference: </span>is</mark> also the largest city.' in html
    assert '<mark><span class="hidden">first difference: </span>Lyon.</mark>' in html
    assert report._parts("Paris", 5) == ("Paris", "∅", "")
    assert report._parts("Paris and", None) == ("Paris and", "", "")


def test_a_release_that_measured_nothing_has_a_report(result: Result) -> None:
    failed = [
        ResultVariant(name=variant.name, status="failed", spec=variant.spec, error="no such model")
        for variant in result.variants
    ]
    page = report.render(result.model_copy(update={"baseline": None, "variants": failed, "error": "no such model"}))
    assert "<svg" not in page
    assert "Failed: no such model" in page


def test_numbers_that_are_not_finite_do_not_break_the_plots(result: Result) -> None:
    broken = {
        **result.variants[0].metrics,
        "kl_mean": float("inf"),
        "perplexity": float("nan"),
        "load_seconds": float("inf"),
    }
    page = report.render(
        result.model_copy(update={"variants": [result.variants[0].model_copy(update={"metrics": broken})]})
    )
    assert "not finite" in page


def test_five_variants_with_long_answers_stay_small(result: Result, tmp_path: Path) -> None:
    samples = [Sample(prompt=f"p{i}", baseline="b" * 20000, answer="a" * 20000, diverges_at=0) for i in range(50)]
    variants = [result.variants[0].model_copy(update={"name": f"v{i}", "samples": samples}) for i in range(5)]
    assert len(report.render(result.model_copy(update={"variants": variants})).encode()) < 3_000_000
