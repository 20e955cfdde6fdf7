"""What the card and the files beside it tell programs: the Hub's front matter and evaluation results."""

from collections.abc import Container
from typing import Any

import yaml

from configs.schema import CardFacts
from tasks.download.hub import INHERITED
from tasks.formatting import label, points
from tasks.metrics import is_score, parse
from tasks.publish.benchmarks import Benchmark
from tasks.quantize.protocols import CardText
from tasks.result import Result, ResultVariant

ORDER = (
    "language", "license", "license_name", "license_link", "base_model", "base_model_relation", "new_version",
    "library_name",
    "pipeline_tag", "datasets", "tags", "model-index",
)  # fmt: skip
HUB = "https://huggingface.co"
TASK = "text-generation"


def front_matter(result: Result, variant: ResultVariant, method: CardText, title: str) -> dict[str, Any]:
    """The card's metadata: what it inherits from the base model's card, what it is, and its numbers."""
    source, files = result.source, variant.artifact.files if variant.artifact else {}
    facts = result.recipe.publish.card
    front = inherited(source.model, source.commit, source.licence, source.card, files, facts, variant.measured)
    if source.adapter is not None and source.adapter.commit and "base_model" in front:
        front["base_model"] = [front["base_model"], source.adapter.model]
    front |= {"library_name": "transformers", "tags": list(dict.fromkeys([*facts.tags, *tags(method)]))}
    if results := _model_index(result, variant):
        front["model-index"] = [{"name": title, "results": results}]
    return front


def inherited(
    model: str,
    commit: str | None,
    licence: str | None,
    card: dict[str, Any],
    files: Container[str] = (),
    facts: CardFacts | None = None,
    writes_text: bool = True,
) -> dict[str, Any]:
    """What a card takes from the base model's `card`, and from `facts`, which the recipe gives and which come first.

    `files` are published too: a link to one of them stays as it is. Only of a model that is known to write text its task is said
    where the card does not: the Hub finds it out by itself for the others.
    """
    front: dict[str, Any] = {key: card[key] for key in INHERITED if card.get(key) and isinstance(card[key], str | list)}
    if licence:
        front.setdefault("license", licence)
    if commit:
        front |= {"base_model": model, "base_model_relation": "quantized"}
        link = front.get("license_link")
        if isinstance(link, str) and "://" not in link and link not in files:
            front["license_link"] = f"{HUB}/{model}/blob/{commit}/{link}"
    elif isinstance(card.get("base_model"), str | list):  # of a local folder, whose own card says what it was made from
        front["base_model"] = card["base_model"]
    if facts:
        given = {key: value for key, value in facts.model_dump(exclude={"tags"}).items() if value}
        if "base_model" in given:
            front.pop("base_model_relation", None)  # the Hub finds it out from the files
        front |= given
    if writes_text:
        front.setdefault("pipeline_tag", TASK)
    return front


def tags(method: CardText | None) -> list[str]:
    """For the Hub's search."""
    return [*method.tags, "quantized", "tame"] if method else ["tame"]


def _model_index(result: Result, variant: ResultVariant) -> list[dict[str, Any]]:
    """The numbers in the Hub's model-index form, unrounded: perplexity and divergence on the text, scores of the tasks."""
    if result.recipe.evaluate is None:
        return []
    text = result.recipe.evaluate.text
    data = {"type": text.dataset or "text", "name": text_name(variant)}
    if text.dataset:
        data |= {key: value for key, value in (("config", text.config), ("split", text.split)) if value}
    found = [
        {"type": kind, "value": variant.metrics[name], "name": label(name)}
        for name, kind in (
            ("perplexity", "perplexity"),
            ("kl_mean", "kl_divergence"),
            ("top1_agreement", "top1_agreement"),
        )
        if name in variant.metrics
    ]
    results: list[dict[str, Any]] = [{"task": {"type": TASK}, "dataset": data, "metrics": found}] if found else []
    for name in points([variant.metrics]):
        if is_score(name):
            task, metric, _ = parse(name)
            score = {"type": metric, "value": variant.metrics[name], "name": label(name)}
            results.append({"task": {"type": TASK}, "dataset": {"type": task, "name": task}, "metrics": [score]})
    return results


def text_name(variant: ResultVariant) -> str:
    """What the text that it was measured on is called."""
    return variant.protocol.text.name if variant.protocol.text else "text"


def eval_results(
    result: Result, variant: ResultVariant, benchmarks: dict[str, Benchmark], repo: str | None = None
) -> dict[str, bytes]:
    """Scores of whole benchmarks that the Hub knows, with the day, and `repo`'s tame.json as their source.

    A part of a benchmark is not its score.
    """
    if result.recipe.evaluate is None or result.recipe.evaluate.task_limit is not None:
        return {}
    files = {}
    for metric, benchmark in benchmarks.items():
        if metric in variant.metrics:
            shots = result.recipe.evaluate.task_fewshot
            notes = f"lm-evaluation-harness {result.versions.get('lm_eval', '')}, {'default' if shots is None else shots} shots"
            entry: dict[str, Any] = {
                "dataset": {"id": benchmark.dataset, "task_id": benchmark.task_id},
                "value": round(100 * variant.metrics[metric], 4),
                "date": result.started[:10],
                "notes": notes,
            }
            if repo and result.recipe.publish.to == "hub":
                entry["source"] = {"url": f"{HUB}/{repo}/blob/main/tame.json", "name": "tame.json"}
            name = f".eval_results/{benchmark.dataset.split('/')[1].lower()}.yaml"
            files[name] = yaml.safe_dump([entry], sort_keys=False).encode()
    return files


def with_front_matter(front: dict[str, Any], lines: list[str]) -> str:
    """A card from its metadata and its paragraphs, of which empty ones are left out."""
    ordered = {key: front[key] for key in ORDER if key in front}
    head = yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n" + "\n\n".join(filter(None, lines)) + "\n"
