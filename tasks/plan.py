"""What a recipe would do, found out without doing any of it; and whether it can be done at all.

What cannot is refused before anything slow is imported: not Prefect, which takes 2 to 5 s, nor torch. So this file has no
Prefect shell (that is in flows/release.py), and of the stages it imports at the top only what has none either.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError
from configs.schema import Evaluate, Recipe, Source, Variant
from configs.settings import home
from tasks.download.architectures import called_by, check_known, no_language_model
from tasks.download.checkpoint import unread
from tasks.download.facts import facts_of
from tasks.download.folder import check_measurable
from tasks.download.inspection import inspect_source, local_path, tokenizer_folder
from tasks.download.published_scores import PublishedScore, published_scores
from tasks.download.text import LoadedText, load_text
from tasks.download.tokenizer_files import chat_template, check_bos
from tasks.fit.limits import check_no_experts
from tasks.fleet.work_queues import check_fits
from tasks.publish.benchmarks import Benchmark, Benchmarks
from tasks.publish.benchmarks import find as find_benchmarks
from tasks.publish.preflight import full_names
from tasks.publish.preflight import preflight as preflight_publish
from tasks.publish.targets import targets
from tasks.quantize.methods import reader_of
from tasks.quantize.refusals import check_variant
from tasks.runtime.device import gpus, pick
from tasks.runtime.files import check_writable
from tasks.serve.runtimes import versions_of
from tasks.store import artifacts as store
from tasks.values import Found


class Plan(BaseModel):
    """A recipe that can be run: what was found, where its variants go, and what somebody should know first."""

    model_config = ConfigDict(frozen=True)

    found: Found
    targets: dict[str, str]
    """Hub repo id or absolute folder of each variant, by its label; empty when nothing is published."""
    text: LoadedText | None
    """The evaluation text, so that the flow need not read it again; None where nothing is measured."""
    tokens: int | None
    """Tokens in the evaluation text, where they had to be counted to know that it fills a window."""
    benchmarks: dict[str, Benchmark]
    """The Hub's benchmarks that are measured in full, by the metric that is their score."""
    published: list[PublishedScore] = []
    """What the source's authors say that it scores, where tasks are measured."""
    warnings: list[str]


_made: dict[str, Plan] = {}


def preflight(recipe: Recipe, out: Path) -> Plan:
    """Check all that can be checked before anything is made: folders, source and where it is published, text and tasks.

    Raises:
        BadInputError: the recipe cannot be run as it stands.
        TameError: a folder that cannot be written, a source that is damaged, a Hub that does not answer.
    """
    key = f"{recipe.model_dump_json()} {out}"
    if key not in _made:
        _made[key] = _preflight(recipe, out)
    return _made[key]


def _preflight(recipe: Recipe, out: Path) -> Plan:
    path = local_path(recipe.source.model)
    check_writable(out)
    check_writable(home())
    store.check()
    measured = recipe.evaluate is not None
    found = look_at(recipe.source, measured) if path is not None else None
    where = targets(recipe, found.name if found else _last(recipe.source), out)
    # The token before a repo: with one that the Hub does not accept, every other question is answered with 401.
    warnings = preflight_publish(recipe, where, None) if where else []
    if recipe.publish.to == "hub":
        where = full_names(where)
    found = found or look_at(recipe.source, measured)
    check_fits(found, recipe.evaluate, gpus())
    benchmarks = Benchmarks({}, [])
    if where:
        warnings = preflight_publish(recipe, where, found)
        if recipe.evaluate is not None and recipe.evaluate.task_limit is None:
            benchmarks = find_benchmarks(recipe.evaluate.tasks)
    text = load_text(recipe.evaluate.text) if recipe.evaluate is not None else None
    experts = facts_of(found).experts
    for variant in recipe.variants:
        if variant.checkpoint is not None:
            _check_theirs(variant, found)
            continue
        check_variant(variant, found.config, experts, recipe.source.model)
        if variant.fit and experts:
            check_no_experts(variant, recipe.source.model)
    if any(variant.calibrate or variant.fit for variant in recipe.variants):
        _check_calibration(recipe, found, text)
    tokens = None
    if recipe.evaluate is not None and text is not None:
        tokens = _check_evaluation(recipe.source, recipe.evaluate, found, text)
    for runtime in recipe.serve:
        _check_serve(runtime, recipe, found)
    pick()
    warnings = [*warnings, *benchmarks.notes]
    asked = recipe.evaluate is not None and recipe.evaluate.tasks
    return Plan(
        found=found,
        targets=where,
        text=text,
        tokens=tokens,
        benchmarks=benchmarks.found,
        published=published_scores(recipe.source, found) if asked else [],
        warnings=warnings,
    )


def _check_evaluation(source: Source, spec: Evaluate, found: Found, text: LoadedText) -> int | None:
    """Check that the text fills a window, and that the tasks are there; returns the text's tokens if they were counted.

    Raises:
        BadInputError: it cannot be measured as it is asked for.
    """
    from tasks.download.text import check_text
    from tasks.evaluate.lm_eval_index import check_tasks

    tokens, window = None, spec.window
    if folder := tokenizer_folder(source, found):
        tokens = check_text(text, window, folder, source.trust_remote_code)
        check_bos(folder, spec.bos)
        chat_template(folder, spec.chat)
    elif len(text.text.encode()) < window - 2:  # a token is a byte at least, but for those that begin and end a text
        raise BadInputError(f"evaluate.text {text.name}: shorter than one window of {window} tokens; give more text")
    check_tasks(spec.tasks, spec.task_path)
    return tokens


def look_at(source: Source, measured: bool = True) -> Found:
    """Look at a source, and check that it is a language model with a tokenizer: something that can be measured.

    One that is not to be `measured` may be any model that transformers has a class for.

    Raises:
        BadInputError: the source is something else, or the cases that `inspect_source` names.
        TameError: as `inspect_source`.
    """
    found, where = inspect_source(source), f"source.model {source.model}"
    if found.kind != "gguf":  # whose header tells
        quantization = found.config.get("quantization_config")
        if quantization and reader_of(quantization) is None:
            raise unread(quantization, where)
        if measured:
            check_measurable(found, where, source.trust_remote_code)
        else:
            check_known(found.config, where, source.trust_remote_code)
    return found


def _check_serve(runtime: str, recipe: Recipe, found: Found) -> None:
    """Check that a runtime is there, and that the model answers what it will be asked.

    Raises:
        BadInputError: there is no environment of the runtime's; or the model writes no text.
    """
    versions_of(runtime)
    if found.kind != "gguf" and (reason := no_language_model(found.config, found.files)):
        raise BadInputError(
            f"serve {runtime}: {recipe.source.model} is {called_by(found.config)}: {reason}, and runtimes are asked for text; "
            "leave serve out"
        )


def _check_theirs(variant: Variant, ours: Found) -> None:
    """See that somebody else's checkpoint is there, and has our model's vocabulary, as far as its config.json tells.

    Raises:
        BadInputError, TameError: as `inspect_source`; or it is of another model.
    """
    theirs = inspect_source(variant.source, quantized=True)
    sizes = [(each.config.get("text_config") or each.config).get("vocab_size") for each in (ours, theirs)]
    kinds = [each.config.get("model_type") for each in (ours, theirs)]
    if None not in sizes and (sizes[0] != sizes[1] or kinds[0] != kinds[1]):
        raise BadInputError(
            f"variants {variant.label}: {variant.checkpoint} is a {kinds[1]} of {sizes[1]} tokens, the source a {kinds[0]} of "
            f"{sizes[0]}; give a checkpoint of the same model"
        )
    check_measurable(theirs, f"variants {variant.label}: {variant.checkpoint}", variant.source.trust_remote_code)


def _check_calibration(recipe: Recipe, found: Found, evaluated: LoadedText | None) -> None:
    """Check that there is a calibration text, that it is not also evaluated, and that the model can be calibrated.

    Raises:
        BadInputError: a text is missing, is also evaluated, or the architecture cannot be calibrated.
        TameError: a text cannot be read.
    """
    from tasks.calibrate.sequences import check_apart, check_length, load_texts

    if found.kind != "gguf" and (reason := no_language_model(found.config, found.files)):
        raise BadInputError(
            f"{recipe.source.model}: it is {called_by(found.config)}: {reason}; calibrate and fit work on causal language models "
            "alone, leave them out"
        )
    if method := (found.config.get("quantization_config") or {}).get("quant_method"):
        raise BadInputError(
            f"{recipe.source.model}: its weights are quantized ({method}); calibrate and fit work on sources in 16 or 32 "
            "bits alone, leave them out"
        )
    if recipe.evaluate is None:
        load_texts(recipe.calibration)
    elif evaluated is not None and not (
        recipe.calibration.text.builtin and recipe.evaluate.text.builtin
    ):  # those are apart, and a test keeps them so
        check_apart(load_texts(recipe.calibration), evaluated)
    if folder := tokenizer_folder(recipe.source, found):
        check_length(recipe.calibration, folder)


def _last(source: Source) -> str:
    """What a Hub source is called before it was looked at: as its adapter, if it has one."""
    return (source.adapter or source.model).rstrip("/").rsplit("/", 1)[-1]
