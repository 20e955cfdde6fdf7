"""The model card and the other files published beside the weights, made from a result and nothing else but the ids of benchmarks.

Equal results make equal bytes. Front matter follows the Hub's model card metadata
(https://huggingface.co/docs/hub/model-cards), `.eval_results/*.yaml` its evaluation results
(https://huggingface.co/docs/hub/eval-results). Figures in tables are rounded by `tasks.formatting.figure`; tame.json and the
front matter have them unrounded.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from configs.errors import TameError
from tasks.evaluate.sanity import PUBLISHED
from tasks.formatting import NOT_MEASURED, cell, figure, label, points, rows, short_name, span, verdict
from tasks.metrics import difference, measured, parse, unit_of
from tasks.publish import provenance
from tasks.publish.benchmarks import Benchmark
from tasks.publish.card_metadata import HUB, eval_results, front_matter, tags, text_name, with_front_matter
from tasks.publish.usage import serving, usage
from tasks.quantize.methods import described_by, method_of
from tasks.quantize.protocols import CardText
from tasks.result import NOTHING_MEASURED, Result, ResultVariant
from tasks.sentences import advice, meaning
from tasks.values import Protocol

COMPARED = ("size_bytes", "perplexity", "kl_mean", "top1_agreement")
"""What the card compares the variants of a release by."""
MEASURED = "What is written here was measured on exactly these files."
LONGEST_ANSWER = 800
"""Characters of a sample on the card."""


def release_files(
    result: Result, label: str, repos: dict[str, str] | None = None, benchmarks: dict[str, Benchmark] | None = None
) -> dict[str, bytes]:
    """README.md, tame.json and .eval_results/*.yaml of the variant `label`, by name.

    `repos` says where each variant goes, by its label; without it the recipe's template is filled in. `benchmarks` has those of
    the Hub's benchmarks that were measured, by the metric that is their score.

    Raises:
        TameError: a number that is not finite.
    """
    variant = next(found for found in result.variants if found.name == label)
    for name, value in variant.metrics.items():
        if not math.isfinite(value):
            raise TameError(f"{label}: {name} is {value}, so it is not published; see the report, and set a gate")
    repos = {name: provenance.base_name(repo) for name, repo in (repos or _repos(result)).items()}
    scores = eval_results(result, variant, benchmarks or {}, repos.get(label))
    documents = {"README.md": _card(result, variant, repos).encode(), **scores}
    return {**documents, provenance.NAME: _provenance(result, variant, documents)}


def _provenance(result: Result, variant: ResultVariant, documents: dict[str, bytes]) -> bytes:
    """tame.json of `variant`; `documents` are the other files."""
    artifact = variant.artifact
    content = {
        "format": 1,
        "source": _source(result),
        "variant": {"name": variant.name, "spec": variant.made_as.model_dump(mode="json")},
        "artifact": artifact.model_dump(include={"digest", "bytes", "files"}) if artifact else None,
        "metrics": provenance.lasting(variant.metrics),
        "baseline": provenance.lasting(result.baseline.metrics) if result.baseline else None,
        "protocol": variant.protocol.model_dump(mode="json"),
        "gate": variant.gate.model_dump() if variant.gate else None,
        "calibration": variant.calibration.model_dump(exclude={"path", "cached"}) if variant.calibration else None,
        **({"served": [each.model_dump(exclude={"cached"}) for each in variant.served]} if variant.served else {}),
        "notes": variant.notes,
        "left": [entry.model_dump() for entry in variant.left],
        "recipe": provenance.without_paths(result.recipe),
        "versions": result.versions,
        "documents": {name: hashlib.sha256(text).hexdigest() for name, text in sorted(documents.items())},
        "run": {
            "hardware": result.hardware,
            "metrics": provenance.of_this_run(variant.metrics),
            "baseline": provenance.of_this_run(result.baseline.metrics) if result.baseline else None,
            "prefect": result.prefect_run,
            "mlflow": result.mlflow_run,
        },
    }
    return provenance.dump(content)


def _source(result: Result) -> dict[str, Any]:
    """The source as strangers may see it; an adapter only where there is one."""
    source = result.source.model_dump(exclude={"card", "adapter"})
    if (adapter := result.source.adapter) is not None:
        source["adapter"] = {**adapter.model_dump(), "model": provenance.base_name(adapter.model)}
    return {**source, "model": provenance.base_name(result.source.model)}


def plain_files(folder: Path, files: dict[str, str], repo: str) -> dict[str, bytes]:
    """A card, unless there is one, and a tame.json for a folder of which nothing more is known than its files."""
    config = json.loads((folder / "config.json").read_bytes()) if "config.json" in files else {}
    described = described_by(config.get("quantization_config"))
    text = described[0].card(described[1]) if described else None
    documents: dict[str, bytes] = {}
    if "README.md" not in files:
        front = {"library_name": "transformers", "tags": tags(text)}
        lines = [
            f"# {repo.split('/')[-1]}",
            *usage(repo, text, folder, sum((folder / name).stat().st_size for name in files)),
            "## Provenance",
            _plain_provenance(text),
        ]
        documents["README.md"] = with_front_matter(front, lines).encode()
    return {**documents, provenance.NAME: provenance.plain_document(folder, files, documents)}


def _card(result: Result, variant: ResultVariant, repos: dict[str, str]) -> str:
    base = provenance.base_name(result.source.model)
    repo = repos.get(variant.name, variant.name)
    title = f"{short_name(base)} {variant.name}"
    method = method_of(variant.spec).card(variant.spec)
    front = front_matter(result, variant, method, title)
    commit = (
        f" at commit `{result.source.commit}`" if result.source.commit else f" (sha256 `{result.source.digest[:12]}…`)"
    )
    name = f"[{base}]({HUB}/{base})" if result.source.commit else f"`{base}`"
    if (adapter := result.source.adapter) is not None:
        called = provenance.base_name(adapter.model)
        linked = f"[{called}]({HUB}/{called}) at commit `{adapter.commit}`" if adapter.commit else f"`{called}`"
        commit += f", with the adapter {linked} merged into it"
    lines = [
        f"# {title}",
        *([f"**{_plain(advice(result))}**", meaning(result)] if len(result.variants) > 1 else []),
        f"{name}{commit}, quantized to {method.quantized_to} by tame {result.versions.get('tame', '')}".rstrip() + ".",
        f"{MEASURED if variant.measured else NOTHING_MEASURED} Training, intended use, languages, risks and the base model's own "
        "results are its authors' to tell: see its card.",
        *([_plain(variant.calibration.sentence)] if variant.calibration else []),
        *usage(repo, method, *_where(variant)),
        *serving(repo, method, variant.served, variant.left),
        *_quality(result, variant),
        *_sample(variant),
        *_speed(result, variant),
        *_left(variant),
        *_limits(result, variant, method),
        *_siblings(result, variant, repos),
        *_reproduce(result),
    ]
    return with_front_matter(front, lines)


def _where(variant: ResultVariant) -> tuple[Path | None, int | None]:
    """The folder of a variant's files and their size in bytes; Nones where it was not made."""
    return (Path(variant.artifact.path), variant.artifact.bytes) if variant.artifact else (None, None)


def _quality(result: Result, variant: ResultVariant) -> list[str]:
    base = result.baseline.metrics if result.baseline else {}
    table = cost_rows(base, variant.metrics)
    if not table:
        return []
    if not variant.measured:
        lines = [
            "| | Base model | This model |",
            "| --- | ---: | ---: |",
            *(" |".join(row.split(" |")[:3]) + " |" for row in table),
        ]
        return ["## What is known", "\n".join(lines), f"Read from the files. All else was {NOT_MEASURED}."]
    lines = [
        "## What it cost",
        meaning(result) if len(result.variants) == 1 else "",  # else it stands at the top
        _beside("This model", table),
        "The difference in perplexity is its ratio to the base model's. Figures are rounded; `tame.json` has them in full.",
        f"Measured on {_protocol(variant)}.",
    ]
    plain = result.plain_of(variant)
    if plain and (beside := cost_rows(base, plain.metrics)):
        lines += [
            f"Calibrating is what differs from {plain.name}, which was measured in the same way:",
            _beside("Not calibrated", beside),
        ]
    if variant.gate and (limits := variant.gate.checked + variant.gate.reasons):
        lines.append(f"Limits, each at the pessimistic end of its interval: {'; '.join(limits)}.")
    return lines


def _beside(name: str, table: list[str]) -> str:
    """A table of `cost_rows`, of what is called `name`."""
    head = [f"| | Base model | {name} | 95 % interval | Difference |", "| --- | ---: | ---: | ---: | ---: |"]
    return "\n".join([*head, *table])


def _sample(variant: ResultVariant) -> list[str]:
    """The first prompt, and what both answered to it."""
    if not variant.samples:
        return []
    first = variant.samples[0]
    same = first.diverges_at is None
    comparison = "Both answered the same." if same else f"The answers differ from character {first.diverges_at} on."
    return [
        "## An answer of each",
        "The first of the prompts in the report, and what followed, always the likeliest token:",
        _block(first.prompt),
        "The base model:",
        _block(first.baseline),
        *([] if same else ["This model:", _block(first.answer)]),
        f"{comparison} One answer shows the style of a model, not its quality.",
    ]


def _block(text: str) -> str:
    """A model's words as a block of text that they cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    shown = text if len(text) <= LONGEST_ANSWER else f"{text[:LONGEST_ANSWER]} …"
    return f"{fence}text\n{shown}\n{fence}"


def cost_rows(base: dict[str, float], metrics: dict[str, float]) -> list[str]:
    """The lines of the card's table: every metric but times and memory, the base model's beside this one's."""
    return [
        f"| {label(name)} | {figure(name, base.get(name))} | {figure(name, metrics.get(name))} | {span(name, metrics)} | "
        f"{_difference(name, metrics)} |"
        for name in points([base, metrics])
        if not measured(name) and parse(name).role not in ("difference", "p") and name != difference("perplexity")
    ]


def _difference(name: str, metrics: dict[str, float]) -> str:
    other = difference(name)
    return ("× " if unit_of(other) == "ratio" else "") + cell(other, metrics) if other in metrics else ""


def _protocol(variant: ResultVariant) -> str:
    """What makes the numbers comparable, in one sentence."""
    digest = variant.protocol.text.sha256 if variant.protocol.text else None
    parts = [text_name(variant) + (f" (sha256 `{digest[:12]}…`)" if digest else "")]
    plain = {
        key: value
        for key, value in variant.protocol.model_dump().items()
        if key != "text" and not isinstance(value, dict)
    }
    return ", ".join(parts + [f"{key.replace('_', ' ')} {value}" for key, value in plain.items()])


def _speed(result: Result, variant: ResultVariant) -> list[str]:
    names = [name for name in points([variant.metrics]) if measured(name)]
    if not names:
        return []
    base = result.baseline.metrics if result.baseline else {}
    rows = [f"| {label(name)} | {cell(name, base)} | {cell(name, variant.metrics)} |" for name in names]
    speed = result.recipe.evaluate.speed if result.recipe.evaluate else None
    return [
        "## Speed and memory",
        "\n".join(["| | Base model | This model |", "| --- | ---: | ---: |", *rows]),
        f"On {_machine(result.hardware, variant.protocol)}"
        + (f", one sequence, {speed.prompt_tokens} tokens of prompt and {speed.new_tokens} new ones" if speed else "")
        + ". A speed is the median of its repeats, with their range. Another machine gives other figures.",
    ]


def _machine(hardware: dict[str, Any], protocol: Protocol) -> str:
    """What it was measured on, which need not be the machine that publishes."""
    device = protocol.device or "cpu"
    if device == "cpu":
        return f"{hardware.get('cpu', 'a CPU')}, {hardware.get('cores', '?')} cores"
    return device


def _left(variant: ResultVariant) -> list[str]:
    if not variant.left:
        return []
    rows = [f"| `{_plain(left.module)}` | {left.parameters:,} | {_plain(left.reason)} |" for left in variant.left[:30]]
    more = [f"And {len(variant.left) - 30} more: see `tame.json`."] if len(variant.left) > 30 else []
    table = "\n".join(["| Module | Parameters | Why |", "| --- | ---: | --- |", *rows])
    return ["## What was not quantized", table, *more]


def _limits(result: Result, variant: ResultVariant, method: CardText) -> list[str]:
    compared = (
        "It was compared with its base model on the text and tasks above. Other languages, long contexts and safety behaviour "
        "may have suffered more or less."
    )
    base = result.baseline.notes if result.baseline else []
    notes = [f"Of the base model, {note}" for note in base if PUBLISHED in note]
    notes += [note for note in variant.notes if note != NOTHING_MEASURED]  # which the card begins with
    limits = [*map(_plain, notes), *([compared] if variant.measured else []), *method.limits]
    return ["## Limits", "\n".join(f"- {note}" for note in limits)]


def _siblings(result: Result, this: ResultVariant, repos: dict[str, str]) -> list[str]:
    """Every variant of the release with its size and quality, the one that the card is of marked."""
    if len(result.variants) < 2:
        return []
    measured = rows(result)
    names = [name for name in COMPARED if any(name in row.metrics for row in measured)]
    lines = [
        "| " + " | ".join(["", *map(label, names), "Verdict"]) + " |",
        "| --- |" + " ---: |" * len(names) + " --- |",
    ]
    for row in measured:
        name = (
            f"**{row.name}** (this one)"
            if row is this
            else f"{row.name}: `{repos[row.name]}`"
            if row.name in repos
            else row.name
        )
        cells = [
            name,
            *(figure(metric, row.metrics.get(metric)) for metric in names),
            verdict(row).replace("published, ", "").replace("published", "passed"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    sentence = (
        "Each is published only if it kept the limits."
        if any(v.gate and v.gate.checked for v in result.variants)
        else ""
    )
    return ["## Variants of the same release", "\n".join(lines), *([sentence] if sentence else [])]


def _reproduce(result: Result) -> list[str]:
    recipe = yaml.safe_dump(provenance.as_asked(result.recipe), sort_keys=False, allow_unicode=True, width=1000)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))
    return [
        "## Reproduce",
        f"`tame run recipe.yaml` with {versions}, and this recipe:",
        f"```yaml\n{recipe}```",
        "`tame.json` has the digest of every file that went in and came out; `tame publish --check` compares them.",
    ]


def _repos(result: Result) -> dict[str, str]:
    model = short_name(result.source.model)
    template = result.recipe.publish.repo
    return {
        v.name: template.format(model=model, variant=v.name, name=result.recipe.name)
        for v in result.variants
        if v.spec.checkpoint is None
    }


def _plain_provenance(method: CardText | None) -> str:
    what = f"Quantized to {method.quantized_to}. " if method else ""
    return f"{what}Published with tame; it was {NOT_MEASURED}. `tame.json` has the digest of every file."


def _plain(text: str) -> str:
    """Somebody else's words on one line of Markdown, as words alone."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
