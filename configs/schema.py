"""The recipe: everything that can be asked of tame. The form in the Prefect UI is made from these classes.

Values are taken strictly (`"2048"` is not a number, `1` is not `true`), unknown keys are refused, and every number has
its bounds here, so that nothing further down needs to check them again. Defaults are values, not factories: the form shows
only those, and would send empty fields for the others. What no single field can say stands in a validator, and, as far as
JSON schema can say it, in `RULES`: by them the form and Prefect's server refuse a recipe before a worker sees it.
"""

import hashlib
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from configs.method_names import METHODS, OPTIONS


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is blank; write something, or leave the key out")
    return text


Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
]  # also a folder and part of a Hub repo id
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$"), AfterValidator(_not_blank)
]
DTYPES = Literal["float32", "float16", "bfloat16"]


BOUNDS = ("minimum", "maximum", "minLength", "maxLength", "pattern")


def _for_the_form(schema: dict[str, Any], model: "type[Spec]") -> None:
    """Put bounds and rules where Prefect's form looks: it drops all of a field's bounds but those inside `allOf`."""
    for field in schema.get("properties", {}).values():
        if bounds := {key: field[key] for key in BOUNDS if key in field}:
            field["allOf"] = [bounds]
    if model.RULES:
        schema["allOf"] = model.RULES


class Spec(BaseModel):
    """Strict, frozen, and closed to keys it does not know."""

    RULES: ClassVar[list[dict[str, Any]]] = []
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_for_the_form
    )


def _given(**values: Any) -> dict[str, Any]:
    """JSON schema: a field is there, and is something else than what is usual."""
    return {"not": {"properties": values}}


EMPTY = {"type": "null"}


class Source(Spec):
    """The model to start from."""

    model: Text = Field(
        description="A Hub repo, a local folder of safetensors, a .gguf file, or package:NAME/FILE for a .gguf inside an "
        "installed Python package.",
        examples=["Qwen/Qwen3-1.7B", "./my-fine-tune", "./model.Q4_1.gguf"],
    )
    revision: Text = Field(
        "main", description="Branch, tag or commit of a Hub repo. Pinned to a commit before anything is cached."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that the model's repo contains. Leave off unless you have read that code."
    )


def _known_method(method: Any) -> str:
    """`method`, if there is one of that name; the error is what a Literal of the names would give."""
    if isinstance(method, str) and method in METHODS:
        return method
    *others, last = map(repr, METHODS)
    raise PydanticCustomError(
        "literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"}
    )


Method = Annotated[str, PlainValidator(_known_method), WithJsonSchema({"enum": list(METHODS), "type": "string"})]
NOT_GIVEN = {
    "double_quant": {"const": False},
    "compute_dtype": EMPTY,
    "calibrate": {"const": False},
    "group_size": EMPTY,
}


class Variant(Spec):
    """One way of quantizing."""

    RULES = [
        {
            "if": {"properties": {"method": {"const": method}}},
            "then": {"properties": {option: NOT_GIVEN[option] for option in OPTIONS if option not in takes}},
        }
        for method, takes in METHODS.items()
        if OPTIONS.keys() - takes
    ]
    method: Method = Field(
        description="Format of the quantized weights. For transformers and fine-tuning: int8 (8 bits a weight), nf4, fp4 (4 bits). "
        "For vLLM, experts included: w4a16, mxfp4 (4 bits), w8a16, w8a8, fp8 (8 bits).",
        examples=["nf4"],
    )
    double_quant: bool = Field(False, description="Quantize the 4-bit scales too: about 0.4 bits a weight less.")
    compute_dtype: DTYPES | None = Field(
        None,
        description="What 4-bit layers compute in. Empty: the model's own dtype. (transformers' default, float32, is slow.)",
    )
    calibrate: bool | Literal["fast", "best"] = Field(
        False,
        description="Choose the codes on a text (calibration:) instead of taking the nearest ones: same format and size, about a "
        "fifth of the damage. fast: the scales alone, half the gain in a tenth of the time. best: scales are tuned as well.",
    )
    group_size: Literal[-1, 32, 64, 128] | None = Field(
        None,
        description="Integers of w4a16 and w8a16 that share a scale; -1: a whole row. Empty: the largest of 128, 64 and 32 that "
        "divides every row.",
    )
    skip_modules: list[Text] = Field(
        default=[],
        description="Modules to leave unquantized besides those that transformers leaves.",
        examples=[["model.layers.0"]],
        max_length=1000,
    )
    name: Name | None = Field(None, description="Needed only where two variants would share the derived name.")

    @property
    def label(self) -> str:
        """The given name, or the method's, with what was chosen: `nf4`, `nf4-dq`, `nf4-cal`, `nf4-dq-cal-fast`, `w4a16-g64`, …."""
        chosen = ["dq"] if self.double_quant else []
        if self.group_size is not None:
            chosen.append("row" if self.group_size < 0 else f"g{self.group_size}")
        if self.calibrate:
            chosen += ["cal", self.calibrate] if isinstance(self.calibrate, str) else ["cal"]
        return self.name or "-".join([self.method, *chosen])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes, for keys: all but the name; options that came later only where they are used."""
        unused = {key for key in ("calibrate", "group_size") if not getattr(self, key)}
        return self.model_dump(mode="json", exclude={"name", *unused})

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        for option, takers in OPTIONS.items():
            if getattr(self, option) and option not in METHODS[self.method]:
                raise ValueError(f"{option} belongs to {takers}, not to {self.method}; leave it out")
        return self


class TextSource(Spec):
    """The text that perplexity and divergence are measured on: a data set, files, or a built-in. Exactly one of them."""

    RULES = [
        {"if": _given(files=EMPTY), "then": {"properties": {"dataset": EMPTY, "builtin": EMPTY}}},
        {"if": _given(builtin=EMPTY), "then": {"properties": {"dataset": EMPTY}}},
        {
            "if": {"properties": {"files": EMPTY, "builtin": EMPTY}},
            "then": {"properties": {"dataset": {"type": "string"}}, "required": ["dataset"]},
        },
    ]
    KEY: ClassVar[str] = "evaluate.text"
    """Where it stands in a recipe, for errors."""
    dataset: Text | None = Field(None, description="A data set on the Hub.", examples=["Salesforce/wikitext"])
    config: Text | None = Field(None, description="The data set's configuration.", examples=["wikitext-2-raw-v1"])
    split: Text = Field("test", description="The data set's split.")
    revision: Text = Field("main", description="The data set's branch, tag or commit; pinned to a commit.")
    column: Text = Field("text", description="The data set's column that holds the text.")
    files: list[Text] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="UTF-8 text files, read in this order.",
        examples=[["corpus.txt"]],
    )
    builtin: Literal["python-docs"] | None = Field(
        None, description="python-docs: the English reference text inside every CPython. Needs no network."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [key for key in ("dataset", "files", "builtin") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of dataset, files, builtin; got {' and '.join(given) or 'none'}")
        return self


class CalibrationSource(TextSource):
    """The text that codes are chosen on: a data set, files, or a built-in. Exactly one of them; several files are mixed evenly."""

    KEY: ClassVar[str] = "calibration.text"
    split: Text = Field("train", description="The data set's split.")
    column: Text = Field("text", description="The data set's column that holds the text, or chats (messages).")
    builtin: Literal["python-library"] | None = Field(  # type: ignore[assignment]
        None,
        description="python-library: prose and code of the installed Python's standard library. Needs no network.",
    )


class Calibrate(Spec):
    """What the codes of calibrated variants are chosen on. It must not be the text that is evaluated."""

    text: CalibrationSource = Field(
        default=CalibrationSource(builtin="python-library"),
        description="The text; best like what the model is used for.",
    )
    sequences: int = Field(128, ge=1, le=65_536, description="Sequences taken from each text, evenly from all over it.")
    length: int = Field(2048, ge=16, le=131_072, description="Tokens in a sequence.")


class Speed(Spec):
    """How speed is measured, in a fresh process, batch size 1."""

    prompt_tokens: int = Field(512, ge=1, le=131_072, description="Length of the prompt that is prefilled, in tokens.")
    new_tokens: int = Field(64, ge=2, le=8192, description="Tokens decoded after it.")
    repeats: int = Field(
        5, ge=1, le=100, description="Timed repeats after one warm-up; the median is reported, and their range."
    )


class Samples(Spec):
    """Prompts answered greedily by the baseline and by each variant, shown side by side."""

    prompts: list[Text] = Field(
        default=["The capital of France is", "Explain in two sentences why the sky is blue.", "def fibonacci(n):"],
        max_length=50,
        description="Prompts, as they are: no chat template is added.",
    )
    new_tokens: int = Field(48, ge=1, le=2048, description="Tokens generated for each.")


class Evaluate(Spec):
    """What is measured, on the baseline and on every variant."""

    RULES = [{"properties": {"tasks": {"uniqueItems": True}}}]
    text: TextSource = Field(
        default=TextSource(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1"),
        description="The text for perplexity and divergence.",
    )
    window: int = Field(2048, ge=2, le=1_048_576, description="Tokens in a window; windows do not overlap.")
    max_tokens: int | None = Field(
        300_000, ge=2, description="Stop after this many tokens of the text; null takes all of it. At least one window."
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=1024,
        description="Windows in a batch, fewer where memory does not allow; recorded, as int8 depends on it.",
    )
    tasks: list[Text] = Field(
        default=[],
        max_length=200,
        description="Task names of lm-evaluation-harness.",
        examples=[["piqa", "arc_easy"]],
    )
    task_path: Text | None = Field(None, description="A folder of your own lm-evaluation-harness task YAML files.")
    task_limit: int | None = Field(None, ge=1, description="Only the first so many items of each task.")
    task_fewshot: int | None = Field(
        None, ge=0, le=100, description="Examples in the prompt; empty: the task's own default."
    )
    speed: Speed | None = Field(default=Speed(), description="How speed is measured; null leaves it out.")
    samples: Samples | None = Field(default=Samples(), description="Answers shown side by side; null leaves them out.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the bootstrap and of everything else that draws.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.max_tokens < self.window:
            raise ValueError(f"max_tokens {self.max_tokens} is less than one window of {self.window} tokens; raise it")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("a task is listed twice")
        return self


Limit = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Gate(Spec):
    """Limits that a variant must keep to be published, judged on the pessimistic end of each confidence interval."""

    max_perplexity_increase: Limit | None = Field(
        None, description="As a fraction of the baseline's perplexity: 0.05 allows 5 % more.", examples=[0.05]
    )
    max_mean_kl: Limit | None = Field(
        None, title="Max Mean KL", description="KL divergence from the baseline, nats a token.", examples=[0.1]
    )
    min_top1_agreement: Fraction | None = Field(
        None,
        title="Min Top-1 Agreement",
        description="Share of positions where the most likely token is the baseline's.",
        examples=[0.9],
    )
    max_task_drop: Fraction | None = Field(
        None, description="Accuracy lost on any task, absolute: 0.02 allows two points.", examples=[0.02]
    )


class Publish(Spec):
    """Where variants that pass go."""

    RULES = [
        {
            "if": {"not": {"properties": {"to": {"enum": ["folder", "nowhere"]}}}},
            "then": {
                "properties": {
                    "repo": {"pattern": r"^([A-Za-z0-9_{}-][A-Za-z0-9_.{}-]*/)?[A-Za-z0-9_{}-][A-Za-z0-9_.{}-]*$"}
                }
            },
        }
    ]
    to: Literal["hub", "folder", "nowhere"] = Field("nowhere", description="The Hub, a local folder, or nowhere.")
    repo: Text = Field(
        "{model}-{variant}",
        description="Hub repo id, or a folder (relative ones lie under DIR/published). {model}, {variant} and {name} are filled "
        "in.",
        examples=["me/{model}-{variant}"],
    )
    private: bool = Field(True, description="Visibility on the Hub once everything is verified.")
    review: bool = Field(False, description="Leave the pull request to an existing repo open instead of merging it.")
    licence_check: Literal["warn", "refuse"] = Field(
        "warn", description="What to do where the base model's licence or gating may forbid redistribution."
    )

    @model_validator(mode="after")
    def _repo_fits(self) -> Self:
        if unknown := set(re.findall(r"\{([^{}]*)\}", self.repo)) - {"model", "variant", "name"}:
            raise ValueError(f"repo has {{{min(unknown)}}}; only {{model}}, {{variant}} and {{name}} are filled in")
        if re.search(r"[{}]", re.sub(r"\{(model|variant|name)\}", "", self.repo)):
            raise ValueError("repo has a brace without its partner")
        bare = re.sub(r"\{(model|variant|name)\}", "x", self.repo)
        if self.to == "hub" and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", bare, re.ASCII):
            raise ValueError(f"repo {self.repo!r} is not a Hub repo id; write it as owner/name, letters, digits, - _ .")
        if self.to == "folder" and ".." in bare.replace("\\", "/").split("/"):
            raise ValueError(f"repo {self.repo!r} climbs out with '..'; give the folder itself")
        return self


class Track(Spec):
    """Where the numbers are logged."""

    experiment: Text | None = Field(None, description="MLflow experiment; empty: the recipe's name.")


TOGETHER: list[dict[str, Any]] = [
    {"properties": {"variants": {"uniqueItems": True}}},
    {
        "if": _given(gate={"properties": {"max_task_drop": EMPTY}}),
        "then": {
            "properties": {"evaluate": {"properties": {"tasks": {"minItems": 1}}, "required": ["tasks"]}},
            "required": ["evaluate"],
        },
    },
    {
        "if": {
            "properties": {"variants": {"minItems": 2}},
            **_given(publish={"properties": {"to": {"const": "nowhere"}}}),
        },
        "then": {"properties": {"publish": {"properties": {"repo": {"pattern": r"\{variant\}"}}}}},
    },
]


class Recipe(Spec):
    """One model, its variants, how they are measured, judged and published."""

    RULES = TOGETHER
    name: Name = Field(description="Names the run in Prefect and MLflow.", examples=["qwen3-1.7b"])
    source: Source
    variants: list[Variant] = Field(min_length=1, max_length=100, description="What to make of it.")
    calibration: Calibrate = Field(default=Calibrate(), description="What calibrated variants are calibrated on.")
    evaluate: Evaluate = Field(default=Evaluate(), description="What to measure.")
    gate: Gate = Field(default=Gate(), description="What a variant must keep to be published.")
    publish: Publish = Field(default=Publish(), description="Where it goes.")
    track: Track = Field(default=Track(), description="Where the numbers are logged.")

    @model_validator(mode="after")
    def _variants_differ(self) -> Self:
        seen: dict[str, int] = {}
        equal: dict[str, int] = {}
        for i, variant in enumerate(self.variants):
            content = variant.model_dump_json(exclude={"name"})
            if content in equal:
                raise ValueError(f"variants.{i} is the same as variants.{equal[content]}; remove one")
            if variant.label.lower() in seen:
                first = seen[variant.label.lower()]
                raise ValueError(
                    f"variants.{i} and variants.{first} are both named {variant.label!r}; give one a name:"
                )
            equal[content] = seen[variant.label.lower()] = i
        if self.gate.max_task_drop is not None and not self.evaluate.tasks:
            raise ValueError("gate.max_task_drop needs evaluate.tasks; name a task or remove the limit")
        several = len(self.variants) > 1
        if self.publish.to != "nowhere" and several and "{variant}" not in self.publish.repo:
            raise ValueError(f"publish.repo {self.publish.repo!r} is the same for every variant; put {{variant}} in it")
        return self


Models = Annotated[list[Text], Field(min_length=1, max_length=10_000)]
Device = Literal["auto", "gpu", "cpu"]
DEVICE = (
    "Where releases run: gpu sends each to the smallest GPU that it fits on, cpu to workers without one, auto to GPUs if the "
    "work pool has any."
)


class Template(Spec):
    """A recipe without its model: what watch and sweep do with each of theirs."""

    RULES = TOGETHER
    revision: Text = Field("main", description="Branch or tag of a Hub repo.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that the models' repos contain. Leave off unless you have read that code."
    )
    variants: list[Variant] = Field(min_length=1, max_length=100, description="What to make of each model.")
    calibration: Calibrate = Field(default=Calibrate(), description="What calibrated variants are calibrated on.")
    evaluate: Evaluate = Field(default=Evaluate(), description="What to measure.")
    gate: Gate = Field(default=Gate(), description="What a variant must keep to be published.")
    publish: Publish = Field(default=Publish(), description="Where it goes.")
    track: Track = Field(default=Track(), description="Where the numbers are logged.")

    def recipe(self, model: str, revision: str | None = None, variant: Variant | None = None) -> Recipe:
        """The recipe for `model`, pinned to `revision` if one is given, of all variants or of one alone."""
        variants = [variant] if variant else self.variants
        label = f"-{variant.label}" if variant else ""
        source = Source(model=model, revision=revision or self.revision, trust_remote_code=self.trust_remote_code)
        rest = {key: getattr(self, key) for key in ("calibration", "evaluate", "gate", "publish", "track")}
        return Recipe(name=_name(f"{model}{label}"), source=source, variants=variants, **rest)

    @model_validator(mode="after")
    def _is_a_recipe(self) -> Self:
        self.recipe("model")
        return self


class Watch(Spec):
    """Models that are released again whenever they have moved."""

    models: Models = Field(
        description="Hub repos, local folders, or patterns of either: every repo of a namespace that matches is watched.",
        examples=[["Qwen/Qwen3-1.7B", "me/my-fine-tune-*", "/data/fine-tunes/*"]],
    )
    recipe: Template = Field(description="What to do with a model that has moved.")
    settle_seconds: int = Field(
        120,
        ge=0,
        le=86_400,
        description="A change younger than this is left to the next look, so that several in a row give one release.",
    )
    attempts: int = Field(3, ge=1, le=20, description="How often a release that fails is started for the same change.")
    device: Device = Field("auto", description=DEVICE)

    @model_validator(mode="after")
    def _publishes_apart(self) -> Self:
        _check_repo(self.models, self.recipe)
        return self


class Sweep(Spec):
    """Models times variants, each released by a run of its own, and compared at the end."""

    name: Name = Field(description="Names the leaderboard, and the MLflow experiment.", examples=["small-models"])
    models: Models = Field(
        description="Hub repos and local folders.", examples=[["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"]]
    )
    recipe: Template = Field(description="What to do with each model; every variant becomes a run.")
    limit: int | None = Field(None, ge=1, description="Runs that wait or work at a time; empty: all at once.")
    device: Device = Field("auto", description=DEVICE)
    prefetch: bool = Field(
        False,
        description="Workers without a GPU download the models, into a store that all share, while GPUs are at work.",
    )

    @model_validator(mode="after")
    def _publishes_apart(self) -> Self:
        _check_repo(self.models, self.recipe)
        if pattern := next((model for model in self.models if is_pattern(model)), None):
            raise ValueError(f"models has the pattern {pattern!r}; a sweep takes models by name")
        return self


def is_pattern(model: str) -> bool:
    """Whether `model` stands for all that match it."""
    return any(character in model for character in "*?[")


def _check_repo(models: list[str], template: Template) -> None:
    if len(set(models)) != len(models):
        raise ValueError(f"models has {next(m for m in models if models.count(m) > 1)!r} twice")
    several = len(models) > 1 or is_pattern(models[0])
    publish = template.publish
    if publish.to != "nowhere" and several and not re.search(r"\{(model|name)\}", publish.repo):
        raise ValueError(f"recipe.publish.repo {publish.repo!r} is the same for every model; put {{model}} in it")


def _name(text: str) -> str:
    """`text` as a `Name`: me/my-model is me--my-model; what is too long ends in a digest."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.strip("/").replace("/", "--")).strip("-._") or "model"
    return name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
