"""A recipe that suits a model and this machine: what `tame run MODEL`, `tame init` and the form for one model are made from."""

import difflib
import shutil
from typing import Any, NamedTuple

from configs.errors import BadInputError, TameError
from configs.method_names import METHODS, WITH_EXPERTS
from configs.schema import SMALL_GROUP, Source, Variant, name_of
from configs.settings import home
from configs.write import yaml_of
from tasks.download import hub
from tasks.download.architectures import called_by, no_language_model
from tasks.download.facts import Facts, facts_of
from tasks.download.inspection import inspect_source, tokenizer_folder
from tasks.formatting import figure
from tasks.quantize.methods import method_of
from tasks.runtime.device import gpus, hardware, pick
from tasks.runtime.device import name_of as name_of_device
from tasks.runtime.files import existing_parent
from tasks.values import Found

LEVELS: dict[str, bool | str] = {"true": True, "fast": "fast", "best": "best"}
LIMITS = ((4e8, 0.5), (3e9, 0.2), (2e10, 0.1))
"""Parameters, and the KL in nats a token up to which a 4-bit model of fewer is worth having: small ones lose more."""
LIMIT_OF_LARGE = 0.05
FREE = 0.8
"""The part of the memory that weights may take: activations and what is kept of the context need the rest."""
BYTES_IN_4_BITS = 0.5625
"""Bytes of a weight in 4 bits, with its share of a scale for 64."""


class Suggestion(NamedTuple):
    """A recipe, as a mapping, and what it was made from."""

    recipe: dict[str, Any]
    facts: Facts
    found: Found


def suggest(
    model: str,
    *,
    to: str | None = None,
    calibrate: str | None = None,
    publish: str | None = None,
    limit: float | None = None,
    private: bool = True,
    revision: str = "main",
) -> Suggestion:
    """The recipe for `model`.

    Args:
        model: As `source.model`.
        to: Formats by their names, separated by commas; None: what suits the model.
        calibrate: `true`, `fast` or `best`: calibrates the formats that can be.
        publish: Owner on the Hub, or a folder that begins with `.`, `/` or `~`; None: nowhere.
        limit: Most KL that a variant may have, nats a token; None: what suits the model's size.
        private: Whether it stays private on the Hub.
        revision: Branch, tag or commit of a Hub repo.

    Raises:
        BadInputError: there is no such model or format. TameError: the Hub does not answer.
    """
    formats = None if to is None else [_variant(part.strip(), calibrate) for part in to.split(",") if part.strip()]
    if formats == []:
        raise BadInputError(f"--to: expected formats such as nf4,int8; there are {', '.join(METHODS)}")
    source = {"model": model} if revision == "main" else {"model": model, "revision": revision}
    asked = Source(model=model, revision=revision)
    found = _inspect(asked)
    facts = facts_of(found, tokenizer_folder(asked, found) if found.path else None)
    recipe: dict[str, Any] = {
        "name": name_of(found.name),
        "source": source,
        "variants": formats or _suited(facts, calibrate, quantized=bool(found.config.get("quantization_config"))),
        **_measuring(found),
        "gate": {"max_mean_kl": _limit(facts) if limit is None else limit},
    }
    if publish is not None:
        folder = publish.startswith((".", "/", "~"))
        repo = "{model}-{variant}" if publish == "." else f"{publish.rstrip('/')}/{{model}}-{{variant}}"
        recipe["publish"] = (
            {"to": "folder", "repo": repo} if folder else {"to": "hub", "repo": repo, "private": private}
        )
    return Suggestion(recipe, facts, found)


def commented(suggestion: Suggestion) -> str:
    """The recipe as YAML for somebody to edit: what each part is for, and why it is as it is."""
    recipe, facts, found = suggestion
    if found.kind != "gguf" and (reason := no_language_model(found.config, found.files)):
        return _unmeasured(recipe, f"{called_by(found.config)}: {reason}")
    free = shutil.disk_usage(existing_parent(home())).free
    devices = gpus()
    memory = f", {figure('size_bytes', devices[0].memory_bytes)}" if devices else ""
    other = "fp8" if not facts.is_mixture else "w8a16"
    where = recipe.get("publish") or {"to": "nowhere", "repo": "me/{model}-{variant}"}
    parts = [
        f"# {recipe['source']['model']}: {facts.summary}, {figure('size_bytes', found.bytes)}.",
        f"# Made for this machine: {name_of_device(pick())}{memory}; {figure('size_bytes', free)} of disk free.",
        "# Every key is explained in configs/schema.py. `tame plan` says what this would do, `tame run` does it.",
        yaml_of({key: recipe[key] for key in ("name", "source")}).rstrip(),
        _why_these(facts),
        yaml_of({"variants": recipe["variants"]}).rstrip(),
        f"# - {{method: {other}}}   # another format; there are {', '.join(METHODS)}",
        *_small_groups(recipe),
        *_fitted(recipe, facts),
    ]
    if "calibration" in recipe:
        parts += ["# Calibrated variants choose their codes on this text; it must not be the one that is measured.",
                  yaml_of({"calibration": recipe["calibration"]}).rstrip()]  # fmt: skip
    parts += [
        "# What is measured, on the original and on each variant: the same text in the same windows.",
        yaml_of({"evaluate": recipe["evaluate"]}).rstrip(),
        "#  tasks: [piqa, arc_easy]   # questions with answers, from lm-evaluation-harness; minutes to hours",
        "# A variant that is further from the original than this is not published (KL divergence, nats a token, on average).",
        yaml_of({"gate": recipe["gate"]}).rstrip(),
        "# to: hub (needs HF_TOKEN with write access), folder, or nowhere. Private until you say otherwise.",
        yaml_of({"publish": where}).rstrip(),
    ]
    return "\n".join(parts) + "\n"


def _unmeasured(recipe: dict[str, Any], what: str) -> str:
    """The same for a model that writes no text, which a recipe has to say by `evaluate: null`."""
    variants = [{key: value for key, value in one.items() if key != "calibrate"} for one in recipe["variants"]]
    return "\n".join(
        [
            f"# {recipe['source']['model']} is {what}.",
            yaml_of({key: recipe[key] for key in ("name", "source")}).rstrip(),
            yaml_of({"variants": variants}).rstrip(),
            "# So nothing can be measured: no model is run, the gate has no limits, and the card says so.",
            "evaluate: null",
            "# to: hub (needs HF_TOKEN with write access), folder, or nowhere. Private until you say otherwise.",
            yaml_of({"publish": {"to": "nowhere", "repo": "me/{model}-{variant}"}}),
        ]
    )


def _inspect(source: Source) -> Found:
    """`inspect_source`, whose refusal names the owner's model that is nearest to one that is not there."""
    try:
        return inspect_source(source)
    except BadInputError as error:
        owner, slash, name = source.model.partition("/")
        if not slash or not hub.REPO_ID.fullmatch(source.model):
            raise
        try:
            theirs = [repo.partition("/")[2] for repo in hub.list_models(owner)]
        except TameError:
            raise error from None
        near = difflib.get_close_matches(name, [one for one in theirs if one != name], n=1)
        raise BadInputError(f"{error}; did you mean {owner}/{near[0]}?" if near else str(error)) from None


def _variant(name: str, calibrate: str | None) -> dict[str, Any]:
    """The variant that a name such as `nf4`, `nf4-dq`, `nf4-cal` or `w4a16-g64` asks for, as results call it."""
    method = max((known for known in METHODS if name == known or name.startswith(f"{known}-")), key=len, default=None)
    if method is None:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        raise BadInputError(f"--to {name}: there is no such format; {hint}")
    variant: dict[str, Any] = {"method": method}
    for option in name[len(method) :].split("-")[1:]:
        if option == "dq":
            variant["double_quant"] = True
        elif option == "cal":
            variant["calibrate"] = True
        elif option in ("fast", "best") and variant.get("calibrate"):
            variant["calibrate"] = option
        elif option == "row" or (option.startswith("g") and option[1:].isdecimal()):
            variant["group_size"] = -1 if option == "row" else int(option[1:])
        elif option == "search":
            variant["scale"] = "search"
        else:
            known = "-dq, -cal, -g64, -row and -search"
            raise BadInputError(f"--to {name}: {option!r} is not known; after {method}, there are {known}")
    if calibrate and "calibrate" in METHODS[method]:
        variant.setdefault("calibrate", LEVELS[calibrate])
    return variant


def _suited(facts: Facts, calibrate: str | None, quantized: bool) -> list[dict[str, Any]]:
    """What suits a model: one in 4 bits and one in 8; of a mixture, in formats that quantize its experts."""
    if facts.is_mixture:
        return [_variant(name, calibrate) for name in ("w4a16", "fp8")]
    return [_variant("nf4", calibrate or (None if quantized else "true")), _variant("int8", None)]


def _why_these(facts: Facts) -> str:
    if facts.is_mixture:
        return f"# Most of it are experts, which {', '.join(WITH_EXPERTS)} quantize and others leave in 16 bits."
    return "# One in 4 bits, its codes chosen on a text (a fraction of the damage), and one in 8 bits, closest to the original."


def _small_groups(recipe: dict[str, Any]) -> list[str]:
    """The 4-bit variant in a smaller and better form, as a comment, with what its format says of it."""
    variant = next((one for one in recipe["variants"] if one["method"] == "nf4" and "group_size" not in one), None)
    if variant is None:
        return []
    options = ", ".join(f"{key}: {str(value).lower()}" for key, value in variant.items() if key != "double_quant")
    *_, needs = method_of(smaller := Variant(method="nf4", group_size=SMALL_GROUP)).card(smaller).limits
    return [
        f"# Smaller than nf4, and closer to the original. {needs}",
        f"# - {{{options}, double_quant: true, group_size: {SMALL_GROUP}}}",
    ]


def _fitted(recipe: dict[str, Any], facts: Facts) -> list[str]:
    """A variant that is fitted, as a comment: to this machine's memory where the original does not fit in, else to a KL."""
    variant = next((one for one in recipe["variants"] if "fit" in METHODS[one["method"]]), None)
    if variant is None or facts.is_mixture:
        return []
    room = int(FREE * _memory())
    plain, least = 2 * facts.parameters, int(2 * facts.parameters - (2 - BYTES_IN_4_BITS) * facts.linear)
    options = ", ".join(f"{key}: {str(value).lower()}" for key, value in variant.items())
    if least > room:
        return [
            f"# In 4 bits it takes about {figure('size_bytes', least)}, and this machine has room for {figure('size_bytes', room)}."
        ]
    if plain > room:
        unit, name = next(
            (unit, name) for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "KB")) if room >= 10 * unit
        )
        size = f"{room // unit}{name}"
        why = f"the best mix for this machine's memory, as the original's {figure('size_bytes', plain)} do not fit"
        return [f"# - {{{options}, fit: {{max_bytes: {size}}}}}   # {why}"]
    close = recipe["gate"]["max_mean_kl"] / 10
    return [f"# - {{{options}, fit: {{max_mean_kl: {close:g}}}}}   # the smallest mix that is this close"]


def _memory() -> int:
    """The memory in which a model is loaded here, in bytes."""
    there = gpus()
    return there[0].memory_bytes if there else int(hardware()["memory_bytes"])


def _measuring(found: Found) -> dict[str, Any]:
    """How it is measured: with what a GPU does in minutes, or a CPU; without a network, where the model needs none."""
    text = {} if found.kind == "hub" else {"text": {"builtin": "python-docs"}}
    calibration: dict[str, Any] = {"text": {"builtin": "python-library"}}
    if gpus():
        return {"calibration": calibration, "evaluate": {**text, "window": 2048, "max_tokens": 100_000}}
    speed = {"prompt_tokens": 128, "new_tokens": 16, "repeats": 2}
    return {
        "calibration": {**calibration, "sequences": 24, "length": 256},
        "evaluate": {**text, "window": 512, "max_tokens": 6144, "speed": speed, "samples": {"new_tokens": 16}},
    }


def _limit(facts: Facts) -> float:
    return next((limit for parameters, limit in LIMITS if facts.parameters < parameters), LIMIT_OF_LARGE)
