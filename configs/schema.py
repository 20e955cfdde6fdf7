"""The recipe: everything that can be asked of tame. The form in the Prefect UI is made from these classes.

Values are taken strictly (`"2048"` is not a number, `1` is not `true`), unknown keys are refused, and every number has
its bounds here, so that no later code has to check them again. Defaults are values and not factories, because the form shows
only values and would send an empty field for a factory. A rule about several fields is written twice: as a validator, and, as far
as JSON schema can express it, in `RULES`. With `RULES`, the form and Prefect's server refuse a recipe before a worker gets it.
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
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from configs.method_names import INTEGER_METHODS, METHODS, OPTIONS, Runtime


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
    """Copy each field's bounds into `allOf`, and add the model's rules. Prefect's form ignores bounds anywhere else.

    Of a value that may be several things it says only that it is none of them. What is wrong within an object is said by a rule.
    """
    rules = list(model.RULES)
    for name, field in schema.get("properties", {}).items():
        if bounds := {key: field[key] for key in BOUNDS if key in field}:
            field["allOf"] = [bounds]
        for choice in field.get("anyOf", []):
            if "$ref" in choice:
                given = {"properties": {name: {"type": "object"}}, "required": [name]}
                rules.append({"if": given, "then": {"properties": {name: choice}}})
    if rules:
        schema["allOf"] = rules


class Spec(BaseModel):
    """The base of every class here. Values are strict and frozen, and an unknown key is an error."""

    RULES: ClassVar[list[dict[str, Any]]] = []
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_for_the_form
    )


def _given(**values: Any) -> dict[str, Any]:
    """A JSON schema that holds where a field is given and its value does not fit the schema in `values`."""
    return {"not": {"properties": values}}


EMPTY = {"type": "null"}


class Source(Spec):
    """The model to start from."""

    model: Text = Field(
        description="Enter the model to start from: a repo on the Hub (owner/name), a local folder with safetensors "
        "files, a .gguf file, or package:NAME/FILE for a .gguf file inside an installed Python package.",
        examples=["Qwen/Qwen3-1.7B", "./my-fine-tune", "./model.Q4_1.gguf"],
    )
    revision: Text = Field(
        "main",
        description="Enter the branch, tag or commit of a Hub repo. It is resolved to a commit once, and the whole "
        "run uses that commit.",
    )
    adapter: Text | None = Field(
        None,
        description="Enter a LoRA adapter of PEFT, a Hub repo or a folder. It is merged into the model before anything "
        "else is done. If the model itself is an adapter alone, its base is found by itself.",
        examples=["me/my-lora"],
    )
    adapter_revision: Text = Field("main", description="Enter the branch, tag or commit of the adapter's repo.")
    trust_remote_code: bool = Field(
        False,
        description="Switch this on to run Python code from the model's repo. Leave it off unless you have read that "
        "code.",
    )


def _known_method(method: Any) -> str:
    """Return `method` if it is empty or the name of a method. The error reads like Pydantic's for a Literal of all names."""
    if isinstance(method, str) and (not method or method in METHODS):
        return method
    *others, last = map(repr, METHODS)
    raise PydanticCustomError(
        "literal_error", "Input should be {expected}", {"expected": f"{', '.join(others)} or {last}"}
    )


WITHOUT_ROWS = [name for name, takes in METHODS.items() if "group_size" in takes and name not in INTEGER_METHODS]
"""The methods with a `group_size` that cannot be a whole row."""
SMALL_GROUP: Literal[32] = 32
"""Weights that share a scale in `small_group_modules`."""
Finer = Literal["eight_bit_modules", "small_group_modules"]
Method = Annotated[str, PlainValidator(_known_method), WithJsonSchema({"enum": [*METHODS, ""], "type": "string"})]
NOT_GIVEN: dict[str, Any] = {
    "double_quant": {"const": False},
    "compute_dtype": EMPTY,
    "calibrate": {"const": False},
    "fit": EMPTY,
    "group_size": EMPTY,
    "scale": EMPTY,
    "eight_bit_modules": {"maxItems": 0},
    "small_group_modules": {"maxItems": 0},
}
LATER = ("calibrate", "fit", "group_size", "scale", "checkpoint", "eight_bit_modules", "small_group_modules")
"""Options that came later than keys: they are part of a key only where they are used."""
SIZE = r"^[0-9]+([.][0-9]+)?[ ]?([KMGT]?B)?$"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(size: str) -> int:
    """Bytes, from `500MB`, `1.2 GB` or a plain number; 0 for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", size.strip().upper())
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


class Fit(Spec):
    """A limit that the variant keeps with as little damage, or as few bytes, as can be: exactly one is given."""

    RULES = [
        {
            "if": {"properties": {"max_mean_kl": EMPTY}},
            "then": {"properties": {"max_bytes": {"type": "string"}}, "required": ["max_bytes"]},
            "else": {"properties": {"max_bytes": EMPTY}},
        }
    ]
    max_mean_kl: Annotated[float, Field(gt=0)] | None = Field(
        None,
        title="Max Mean KL",
        description="Enter the largest mean KL divergence from the baseline, in nats per token. The smallest mix of quantized "
        "and unquantized modules that keeps it is found.",
        examples=[0.05],
    )
    max_bytes: Annotated[str, StringConstraints(pattern=SIZE, max_length=40)] | None = Field(
        None,
        description="Enter the most that the weights may take, such as 1.2GB or 500MB (1 GB is 10^9 bytes). The mix with the "
        "least damage that fits is found.",
        examples=["1.2GB"],
    )

    @field_validator("max_bytes", mode="before")
    @classmethod
    def _in_units(cls, value: Any) -> Any:
        """A plain number of bytes, as YAML reads it, is a size too."""
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.max_mean_kl is None) == (self.max_bytes is None):
            given = "neither" if self.max_bytes is None else "both"
            raise ValueError(f"give exactly one of max_mean_kl and max_bytes; got {given}")
        if self.max_bytes is not None and bytes_of(self.max_bytes) < 1:
            raise ValueError(f"max_bytes {self.max_bytes!r} is less than one byte; write it as 500MB or 1.2GB")
        return self

    @property
    def bytes(self) -> int | None:
        """The limit of `max_bytes` in bytes."""
        return bytes_of(self.max_bytes) if self.max_bytes is not None else None


class Variant(Spec):
    """One way of quantizing the model, or somebody else's checkpoint to compare with. Every method becomes one checkpoint."""

    RULES = [
        {
            "if": {"properties": {"method": {"const": method}}},
            "then": {"properties": {option: NOT_GIVEN[option] for option in OPTIONS if option not in takes}},
        }
        for method, takes in METHODS.items()
        if OPTIONS.keys() - takes
    ] + [
        {
            "if": {"properties": {"method": {"enum": WITHOUT_ROWS}}, "required": ["method"]},
            "then": {"properties": {"group_size": {"not": {"const": -1}}}},
        },
        {
            "if": {"properties": {"checkpoint": EMPTY}},
            "then": {"properties": {"method": {"minLength": 1}}, "required": ["method"]},
            "else": {"properties": {"method": {"maxLength": 0}, **NOT_GIVEN, "skip_modules": {"maxItems": 0}}},
        },
    ]
    method: Method = Field(
        "",
        description="Choose the format of the quantized weights. int8 (8 bits per weight), nf4 and fp4 (4 bits) are "
        "for transformers and for fine-tuning. w4a16, mxfp4 and nvfp4 (4 bits), w8a16, w8a8, fp8 and fp8-block (8 "
        "bits) are for vLLM. All of these but nvfp4 and w8a8 also quantize the experts of a mixture of experts.",
        examples=["nf4"],
    )
    double_quant: bool = Field(
        False,
        description="Switch this on to quantize the scales of nf4 and fp4 as well. It saves about 0.4 bits per weight. A fit "
        "does so by itself, unless this is given as false.",
    )
    compute_dtype: DTYPES | None = Field(
        None,
        description="Choose the dtype that nf4 and fp4 layers compute in. If it is empty, they compute in the model's "
        "own dtype. (The default of transformers, float32, is slow.)",
    )
    calibrate: bool | Literal["fast", "best"] = Field(
        False,
        description="Switch this on to choose the quantized weights by means of a text (see calibration), instead of "
        "rounding each weight to the nearest value. Format and size stay the same, and about a fifth of the damage "
        "remains. fast takes a seventh of the time on a CPU, and about two fifths of the damage remain. best also tunes "
        "the scales afterwards.",
    )
    fit: Fit | Literal["gate"] | None = Field(
        None,
        description="Give a limit, and the modules that matter most stay in 16 bits: the smallest mix that keeps max_mean_kl, "
        "or the best that keeps max_bytes. gate takes the limits of the recipe's gate. What matters is measured on the "
        "calibration text.",
        examples=[{"max_mean_kl": 0.05}, {"max_bytes": "1.2GB"}],
    )
    group_size: Literal[-1, 32, 64, 128] | None = Field(
        None,
        description="Choose how many weights share one scale: fewer are more exact and take more space. nf4 and fp4 have 64 "
        "if it is empty; with double_quant, 32 is smaller and better than 64 without. w4a16 and w8a16 have the largest of 128, "
        "64 and 32 that divides every row if it is empty, and -1 gives each row one scale.",
    )
    scale: Literal["search"] | None = Field(
        None,
        description="Choose search to try 16 scales for each group of weights, for the methods for vLLM, and to keep the "
        "one with the least squared error. If it is empty, the largest weight of the group decides.",
    )
    skip_modules: list[Text] = Field(
        default=[],
        description="List modules that must stay unquantized, by their names in the model. transformers leaves others "
        "unquantized by itself, such as lm_head.",
        examples=[["model.layers.0"]],
        max_length=10_000,
    )
    eight_bit_modules: list[Text] = Field(
        default=[],
        description="List modules of w4a16 that are quantized to 8 bits instead of 4, by their names in the model. Name "
        "modules that vLLM fuses together: q, k and v; gate and up. The output head, lm_head, can be one of them where it is not "
        "tied to the embedding. fit finds such a list by itself.",
        examples=[["model.layers.0.mlp.down_proj"]],
        max_length=10_000,
    )
    small_group_modules: list[Text] = Field(
        default=[],
        description="List modules of nf4 and fp4 whose weights share a scale in groups of 32, which are more exact, by their "
        "names in the model. fit finds such a list by itself.",
        examples=[["model.layers.0.mlp.down_proj"]],
        max_length=10_000,
    )
    checkpoint: Text | None = Field(
        None,
        description="Instead of a method, enter a quantized checkpoint that already exists, a Hub repo or a folder, in "
        "any format that transformers opens. It is measured and compared with the others, and it is never published.",
        examples=["somebody/Qwen3-1.7B-AWQ"],
    )
    name: Name | None = Field(
        None,
        description="Enter a name for this variant. If it is empty, the name is made from the method and the options. "
        "You need one only where two variants would get the same name.",
    )

    @property
    def label(self) -> str:
        """The given name, a checkpoint's, or the method's with what was chosen: `nf4`, `nf4-dq-cal-fast`, `w4a16-g64`, …."""
        if self.checkpoint is not None:
            return self.name or name_of(self.checkpoint.rstrip("/").rsplit("/", 1)[-1])
        chosen = ["dq"] if self.double_quant and not self.fit else []
        if self.group_size is not None:
            chosen.append("row" if self.group_size < 0 else f"g{self.group_size}")
        if self.scale:
            chosen.append(self.scale)
        if self.calibrate:
            chosen += ["cal", self.calibrate] if isinstance(self.calibrate, str) else ["cal"]
        if self.fit:
            chosen.append("fit")
        return self.name or "-".join([self.method, *chosen])

    @property
    def compensates(self) -> bool:
        """Whether its codes undo what quantizing other modules did, so that they belong together."""
        return self.calibrate not in (False, "fast")

    @property
    def unfitted(self) -> Self:
        """The same with all quantized."""
        return self.model_copy(update={"fit": None, "name": None})

    @property
    def in_small_groups(self) -> Self:
        """The same with all in small groups."""
        return self.model_copy(update={"group_size": SMALL_GROUP, "small_group_modules": []})

    @property
    def codes_part(self) -> Literal["all", "codes"]:
        """What part of the calibration text codes are chosen on: not all of it where their mixes are measured on the rest."""
        return "codes" if self.calibrate and self.fit else "all"

    def keeping(self, modules: list[str], finer: list[str] | None = None, group_size: int | None = None) -> Self:
        """The same, its fit replaced by what it came to: `modules` stay in 16 bits, too, and `finer` ones are in 8 bits, or in
        small groups, as the method has it.

        `group_size` is the one that it was decided to have with all quantized.
        """
        key: Finer = "eight_bit_modules" if self.method in INTEGER_METHODS else "small_group_modules"
        lists = {
            "skip_modules": [*self.skip_modules, *modules],
            key: [*getattr(self, key), *(finer or [])],
        }
        update = {key: [*dict.fromkeys(names)] for key, names in lists.items()}
        return self.model_copy(
            update={"fit": None, "name": self.label, "group_size": group_size or self.group_size, **update}
        )

    @property
    def source(self) -> Source:
        """Where somebody else's checkpoint is."""
        return Source(model=str(self.checkpoint))

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes, for keys: all but the name; options that came later only where they are used."""
        unused = {key for key in LATER if not getattr(self, key)}
        return self.model_dump(mode="json", exclude={"name", *unused})

    @model_validator(mode="before")
    @classmethod
    def _smallest_where_fitted(cls, given: Any) -> Any:
        """A fit is to be small: 32 weights to a scale of 8 bits take less than 64 to one of 32 bits, and do less damage."""
        if isinstance(given, dict) and given.get("fit") and "double_quant" in METHODS.get(str(given.get("method")), ()):
            return {"double_quant": True, **given}
        return given

    @model_validator(mode="after")
    def _fits_method(self) -> Self:
        if bool(self.method) == (self.checkpoint is not None):
            given = f"method {self.method} and checkpoint" if self.method else "neither"
            raise ValueError(f"give exactly one of method ({', '.join(METHODS)}) and checkpoint; got {given}")
        if self.checkpoint is not None:
            if own := [key for key in (*OPTIONS, "skip_modules") if getattr(self, key)]:
                raise ValueError(f"{own[0]} says how to quantize, and checkpoint is quantized already; leave it out")
            return self
        for option, takers in OPTIONS.items():
            if getattr(self, option) and option not in METHODS[self.method]:
                raise ValueError(f"{option} belongs to {takers}, not to {self.method}; leave it out")
        if self.group_size == -1 and self.method in WITHOUT_ROWS:
            raise ValueError(f"group_size -1 belongs to w4a16 and w8a16; {self.method} has 32, 64 or 128")
        if self.group_size == SMALL_GROUP and self.small_group_modules:
            raise ValueError("small_group_modules have groups of 32, and with group_size 32 all have; leave one out")
        if self.calibrate and self.scale:
            raise ValueError(
                "scale: search is for variants without calibrate, which searches scales itself; leave one out"
            )
        return self


class TextSource(Spec):
    """The text that perplexity and divergence are measured on: exactly one of a data set, files, or a built-in text."""

    RULES = [
        {"if": _given(files=EMPTY), "then": {"properties": {"dataset": EMPTY, "builtin": EMPTY}}},
        {"if": _given(builtin=EMPTY), "then": {"properties": {"dataset": EMPTY}}},
        {
            "if": {"properties": {"files": EMPTY, "builtin": EMPTY}},
            "then": {"properties": {"dataset": {"type": "string"}}, "required": ["dataset"]},
        },
    ]
    KEY: ClassVar[str] = "evaluate.text"
    """The key of this text in a recipe, for error messages."""
    dataset: Text | None = Field(
        None, description="Enter a data set on the Hub (owner/name).", examples=["Salesforce/wikitext"]
    )
    config: Text | None = Field(
        None, description="Enter the data set's configuration, if it has several.", examples=["wikitext-2-raw-v1"]
    )
    split: Text = Field("test", description="Enter the data set's split that is read.")
    revision: Text = Field(
        "main",
        description="Enter the data set's branch, tag or commit. It is resolved to a commit, which the result records.",
    )
    column: Text = Field("text", description="Enter the name of the data set's column that holds the text.")
    files: list[Text] | None = Field(
        None,
        min_length=1,
        max_length=10_000,
        description="List UTF-8 text files. They are read in this order and joined by blank lines.",
        examples=[["corpus.txt"]],
    )
    builtin: Literal["python-docs"] | None = Field(
        None,
        description="Choose python-docs to measure on the English reference text that every CPython contains. It "
        "needs no network.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [key for key in ("dataset", "files", "builtin") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of dataset, files, builtin; got {' and '.join(given) or 'none'}")
        return self


class CalibrationSource(TextSource):
    """The calibration text: exactly one of a data set, files, or a built-in text. Several files are mixed evenly."""

    KEY: ClassVar[str] = "calibration.text"
    split: Text = Field("train", description="Enter the data set's split that is read.")
    column: Text = Field(
        "text", description="Enter the name of the data set's column that holds the text, or chats (lists of messages)."
    )
    builtin: Literal["python-library"] | None = Field(  # type: ignore[assignment]
        None,
        description="Choose python-library to calibrate on prose and code of the installed Python's standard library. "
        "It needs no network.",
    )


class Calibrate(Spec):
    """The text that variants with `calibrate` are calibrated on. It must not be the text that is evaluated."""

    text: CalibrationSource = Field(
        default=CalibrationSource(builtin="python-library"),
        description="Choose the calibration text. A text that is like what the model will be used for gives the best "
        "result.",
    )
    sequences: int = Field(
        128,
        ge=1,
        le=65_536,
        description="Enter how many sequences are taken from each text. They are spread evenly over it.",
    )
    length: int = Field(2048, ge=16, le=131_072, description="Enter the number of tokens in each sequence.")


class Speed(Spec):
    """How speed is measured. Each measurement runs in a new process with batch size 1."""

    prompt_tokens: int = Field(512, ge=1, le=131_072, description="Enter the length of the prompt in tokens.")
    new_tokens: int = Field(64, ge=2, le=8192, description="Enter how many tokens are generated after the prompt.")
    repeats: int = Field(
        5,
        ge=1,
        le=100,
        description="Enter how often it is timed, after one warm-up. The median and the range of the times are "
        "reported.",
    )


Conversation = Annotated[list[Text], Field(min_length=1, max_length=20)]


class Samples(Spec):
    """Prompts that the baseline and each variant answer by greedy decoding. The report shows the answers side by side."""

    prompts: list[Text | Conversation] | None = Field(
        None,
        max_length=50,
        description="List the prompts. A list of texts is a conversation: the user's turn, the assistant's, and so on, up "
        "to the user's turn that is to be answered. If it is empty, a model with a chat template answers four "
        "conversations, and another model continues three texts.",
        examples=[["Why is the sky blue?", ["I have two apples.", "Good for you.", "I eat one. How many are left?"]]],
    )
    new_tokens: int = Field(48, ge=1, le=2048, description="Enter how many tokens each answer has at most.")
    thinking_tokens: int = Field(
        512,
        ge=0,
        le=32_768,
        description="Enter how many tokens a model that thinks before it answers has for its thought, besides.",
    )

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        for i, prompt in enumerate(self.prompts or []):
            if isinstance(prompt, list) and len(prompt) % 2 == 0:
                raise ValueError(
                    f"prompts.{i} has {len(prompt)} turns, so that the last is the assistant's; end with the user's"
                )
        return self


class Evaluate(Spec):
    """What is measured of the baseline and of every variant."""

    RULES = [{"properties": {"tasks": {"uniqueItems": True}}}]
    text: TextSource = Field(
        default=TextSource(dataset="Salesforce/wikitext", config="wikitext-2-raw-v1"),
        description="Choose the text that perplexity and the divergence from the baseline are measured on.",
    )
    window: int = Field(
        2048,
        ge=2,
        le=1_048_576,
        description="Enter the number of tokens in a window. The text is cut into windows that do not overlap.",
    )
    max_tokens: int | None = Field(
        300_000,
        ge=2,
        description="Enter how many tokens of the text are measured, at least one window. If it is empty (null), all "
        "of it is measured.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=1024,
        description="Enter how many windows are computed at a time. If they do not fit in memory, tame halves the "
        "number until they do. The result records the number, because the results of int8 depend on it.",
    )
    bos: Literal["auto", "always", "never", "once"] = Field(
        "auto",
        description="Choose whether windows begin with a BOS token. auto: they do where the tokenizer puts one before a "
        "text. once: only the text as a whole does. always and never: every window does, or none.",
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Choose whether samples and tasks go through the model's chat template. auto: where it has one.",
    )
    tasks: list[Text] = Field(
        default=[],
        max_length=200,
        description="List tasks of lm-evaluation-harness to run, by name. If it is empty, no task is run.",
        examples=[["piqa", "arc_easy"]],
    )
    task_path: Text | None = Field(
        None,
        description="Enter a folder with your own task files (YAML) for lm-evaluation-harness.",
    )
    task_limit: int | None = Field(
        None,
        ge=1,
        description="Enter how many items of each task are run, from its beginning. If it is empty, all are.",
    )
    task_fewshot: int | None = Field(
        None,
        ge=0,
        le=100,
        description="Enter how many solved examples a task puts before each question. If it is empty, each task's own "
        "default holds.",
    )
    task_new_tokens: int | None = Field(
        None,
        ge=1,
        le=32_768,
        description="Enter how many tokens an answer of a task has at most. If it is empty, the task's own limit holds.",
    )
    speed: Speed | None = Field(
        default=Speed(), description="How speed is measured. If it is null, speed is not measured."
    )
    samples: Samples | None = Field(
        default=Samples(),
        description="The prompts that are answered for the report. If it is null, none are.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Enter the seed of all random numbers, such as those of the bootstrap. Equal seeds give equal "
        "results.",
    )

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
    """Limits that a variant must keep to be published. The worse end of each confidence interval is compared with the limit."""

    max_perplexity_increase: Limit | None = Field(
        None,
        description="Enter the largest increase of perplexity, as a fraction of the baseline's: 0.05 allows 5 % more. "
        "If it is empty, there is no limit.",
        examples=[0.05],
    )
    max_mean_kl: Limit | None = Field(
        None,
        title="Max Mean KL",
        description="Enter the largest mean KL divergence from the baseline, in nats per token. If it is empty, there "
        "is no limit.",
        examples=[0.1],
    )
    min_top1_agreement: Fraction | None = Field(
        None,
        title="Min Top-1 Agreement",
        description="Enter the smallest share of positions at which the variant's most likely token is the baseline's "
        "too: 0.9 is 90 %. If it is empty, there is no limit.",
        examples=[0.9],
    )
    max_task_drop: Fraction | None = Field(
        None,
        description="Enter the largest loss of accuracy on any task, as a difference: 0.02 allows two percentage "
        "points. If it is empty, there is no limit.",
        examples=[0.02],
    )

    @property
    def fitted(self) -> dict[str, float]:
        """The limits that a text alone can tell, for `fit: gate`."""
        names = ("max_perplexity_increase", "max_mean_kl", "min_top1_agreement")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class CardFacts(Spec):
    """What the published card's metadata says where the source's own card does not, or says otherwise."""

    base_model: Text | None = Field(
        None,
        description="Enter the Hub repo (owner/name) that the source was made from, such as the model that was "
        "fine-tuned.",
        examples=["Qwen/Qwen3-1.7B"],
    )
    new_version: Text | None = Field(
        None,
        description="Enter the Hub repo (owner/name) that replaces what is published; the Hub then points to it.",
        examples=["me/Qwen3-1.7B-nf4-cal"],
    )
    license: Text | None = Field(
        None, description="Enter the id of the licence, as the Hub writes it.", examples=["apache-2.0"]
    )
    license_name: Text | None = Field(None, description="Enter the licence's name, if license is other.")
    license_link: Text | None = Field(None, description="Enter the licence's address, if license is other.")
    language: list[Text] = Field([], description="List the languages by their ISO 639 codes.", examples=[["en"]])
    datasets: list[Text] = Field([], description="List the Hub data sets that the source was trained on.")
    tags: list[Text] = Field([], description="List more tags for the Hub's search.", examples=[["chat"]])

    @field_validator("base_model", "new_version")
    @classmethod
    def _is_a_repo(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value, re.ASCII):
            raise ValueError("not a Hub repo id; expected owner/name")
        return value


class Publish(Spec):
    """Where the variants that pass the gate are published."""

    RULES = [
        {
            "if": {"not": {"properties": {"to": {"enum": ["folder", "nowhere"]}}}},
            "then": {
                "properties": {
                    "repo": {"pattern": r"^([A-Za-z0-9_{}-][A-Za-z0-9_.{}-]*/)?[A-Za-z0-9_{}-][A-Za-z0-9_.{}-]*$"}
                }
            },
        },
        {"if": {"properties": {"to": {"const": "nowhere"}}}, "then": {"properties": {"approve": {"const": False}}}},
    ]
    to: Literal["hub", "folder", "nowhere"] = Field(
        "nowhere",
        description="Choose where variants that pass are published: on the Hub, in a local folder, or nowhere.",
    )
    repo: Text = Field(
        "{model}-{variant}",
        description="Enter the Hub repo (owner/name), or the folder; a relative folder lies in the run's folder, "
        "under published. {model}, {variant} and {name} are replaced by the model's, the variant's and the recipe's "
        "name.",
        examples=["me/{model}-{variant}"],
    )
    private: bool = Field(
        True,
        description="Switch this off to make the repo public, which happens when everything in it has been verified. "
        "A public repo that exists already is refused while this is on.",
    )
    review: bool = Field(
        False,
        description="Switch this on to leave the pull request to an existing repo open, for a person to merge.",
    )
    approve: bool = Field(
        False,
        description="Switch this on to be asked before anything is published: the run then waits in Prefect, without a "
        "worker, until somebody has chosen the variants. A run of the command line asks on its terminal.",
    )
    card: CardFacts = Field(
        default=CardFacts(),
        description="Fill this in for a source that is not on the Hub, or whose card says too little.",
    )
    collection: Text | None = Field(
        None,
        max_length=59,
        description="Enter the title of a Hub collection that all that is published is put in. It is made if the owner "
        "has none.",
        examples=["Qwen3 quantized"],
    )
    licence_check: Literal["warn", "refuse"] = Field(
        "warn",
        description="Choose what happens where the base model's licence or gating may forbid redistribution: warn "
        "publishes and says so, refuse stops before any work.",
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
        if self.approve and self.to == "nowhere":
            raise ValueError(
                "approve asks before publishing, but to is nowhere; give hub or folder, or leave approve out"
            )
        if self.to == "folder" and ".." in bare.replace("\\", "/").split("/"):
            raise ValueError(f"repo {self.repo!r} climbs out with '..'; give the folder itself")
        return self


class Track(Spec):
    """Where the numbers are logged."""

    experiment: Text | None = Field(
        None, description="Enter the MLflow experiment. If it is empty, the recipe's name is used."
    )


TOGETHER: list[dict[str, Any]] = [
    {"properties": {"variants": {"uniqueItems": True}}},
    {
        "if": {"properties": {"evaluate": EMPTY}, "required": ["evaluate"]},
        "then": {
            "properties": {
                "gate": {"properties": dict.fromkeys(Gate.model_fields, EMPTY)},
                "variants": {"items": {"properties": {"fit": EMPTY, "checkpoint": EMPTY}}},
            }
        },
    },
    {
        "if": _given(gate={"properties": {"max_task_drop": EMPTY}}),
        "then": {
            "properties": {"evaluate": {"properties": {"tasks": {"minItems": 1}}, "required": ["tasks"]}},
            "required": ["evaluate"],
        },
    },
    {
        "if": {
            "properties": {"variants": {"minItems": 2, "items": {"properties": {"checkpoint": EMPTY}}}},
            **_given(publish={"properties": {"to": {"const": "nowhere"}}}),
        },
        "then": {"properties": {"publish": {"properties": {"repo": {"pattern": r"\{variant\}"}}}}},
    },
]


Serve = Annotated[
    list[Runtime],
    Field(
        max_length=3,
        description="List the programs that are to open each variant that passes, each in a Python environment of its own on "
        "the machine that works: what they compute is compared with transformers, and the card says so. `make vllm` makes "
        "vLLM's environment. With peft, a LoRA is also trained on it for a few steps; `pip install peft==0.21.2` first.",
        examples=[["vllm"]],
    ),
]
EVALUATE = (
    "What is measured, and on which text. If it is null, no model is run, and the card says that nothing was measured: for "
    "models that write no text, such as reward and embedding models."
)


class Recipe(Spec):
    """A release: one model, its variants, and how they are measured, judged and published."""

    RULES = TOGETHER
    name: Name = Field(description="Enter a name for the runs in Prefect and MLflow.", examples=["qwen3-1.7b"])
    source: Source
    variants: list[Variant] = Field(min_length=1, max_length=100, description="List the variants to make of the model.")
    calibration: Calibrate = Field(
        default=Calibrate(),
        description="The text that variants with calibrate are calibrated on.",
    )
    evaluate: Evaluate | None = Field(default=Evaluate(), description=EVALUATE)
    gate: Gate = Field(default=Gate(), description="The limits that a variant must keep to be published.")
    serve: Serve = []
    publish: Publish = Field(default=Publish(), description="Where variants that pass are published.")
    track: Track = Field(default=Track(), description="Where the numbers are logged in MLflow.")

    @property
    def codes_part(self) -> Literal["all", "codes"]:
        """What part of the calibration text codes are chosen on: the same for all variants, so that they share them."""
        return "codes" if any(variant.codes_part == "codes" for variant in self.variants) else "all"

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
        if self.evaluate is None:
            _check_unmeasured(self.variants, self.gate)
        fitted = next((i for i, variant in enumerate(self.variants) if variant.fit == "gate"), None)
        if fitted is not None and not self.gate.fitted:
            raise ValueError(
                f"variants.{fitted}.fit is gate, and the gate has no limit that can be fitted; give gate.max_mean_kl, "
                "gate.max_perplexity_increase or gate.min_top1_agreement"
            )
        if self.gate.max_task_drop is not None and self.evaluate is not None and not self.evaluate.tasks:
            raise ValueError("gate.max_task_drop needs evaluate.tasks; name a task or remove the limit")
        several = len([variant for variant in self.variants if variant.checkpoint is None]) > 1
        if self.publish.to != "nowhere" and several and "{variant}" not in self.publish.repo:
            raise ValueError(f"publish.repo {self.publish.repo!r} is the same for every variant; put {{variant}} in it")
        return self


Models = Annotated[list[Text], Field(min_length=1, max_length=10_000)]
Device = Literal["auto", "gpu", "cpu"]
DEVICE = (
    "Choose where releases run. gpu sends each one to the smallest GPU that it fits on. cpu sends them to workers "
    "without a GPU. auto sends them to GPUs if the work pool has any, and else to workers without."
)


class Template(Spec):
    """A recipe without a model. `watch` and `sweep` make a recipe of it for each of their models."""

    RULES = TOGETHER
    revision: Text = Field("main", description="Enter the branch or tag of the Hub repos.")
    trust_remote_code: bool = Field(
        False,
        description="Switch this on to run Python code from the models' repos. Leave it off unless you have read that "
        "code.",
    )
    variants: list[Variant] = Field(
        min_length=1, max_length=100, description="List the variants to make of each model."
    )
    calibration: Calibrate = Field(
        default=Calibrate(),
        description="The text that variants with calibrate are calibrated on.",
    )
    evaluate: Evaluate | None = Field(default=Evaluate(), description=EVALUATE)
    gate: Gate = Field(default=Gate(), description="The limits that a variant must keep to be published.")
    serve: Serve = []
    publish: Publish = Field(default=Publish(), description="Where variants that pass are published.")
    track: Track = Field(default=Track(), description="Where the numbers are logged in MLflow.")

    def recipe(self, model: str, revision: str | None = None, variant: Variant | None = None) -> Recipe:
        """Make the recipe for `model`, at `revision` if one is given, with all variants or with `variant` alone."""
        variants = [variant] if variant else self.variants
        label = f"-{variant.label}" if variant else ""
        source = Source(model=model, revision=revision or self.revision, trust_remote_code=self.trust_remote_code)
        rest = {key: getattr(self, key) for key in ("calibration", "evaluate", "gate", "serve", "publish", "track")}
        return Recipe(name=name_of(f"{model}{label}"), source=source, variants=variants, **rest)

    @model_validator(mode="after")
    def _is_a_recipe(self) -> Self:
        self.recipe("model")
        return self


class Watch(Spec):
    """Models that are released again whenever they have changed."""

    models: Models = Field(
        description="List the models to watch: Hub repos, local folders, or patterns of either with * ? [ ]. A "
        "pattern stands for every repo of its owner, or every folder, that matches it.",
        examples=[["Qwen/Qwen3-1.7B", "me/my-fine-tune-*", "/data/fine-tunes/*"]],
    )
    recipe: Template = Field(description="What is done with a model that has changed.")
    settle_seconds: int = Field(
        120,
        ge=0,
        le=86_400,
        description="Enter how many seconds must have passed since a change before it is released. Several changes in "
        "a row then give one release.",
    )
    attempts: int = Field(
        3,
        ge=1,
        le=20,
        description="Enter how often a release is started for one change, if it fails each time.",
    )
    device: Device = Field("auto", description=DEVICE)

    @model_validator(mode="after")
    def _publishes_apart(self) -> Self:
        _check_repo(self.models, self.recipe)
        return self


class Sweep(Spec):
    """Several models in several variants. Each pair is released by a run of its own, and all are compared at the end."""

    name: Name = Field(
        description="Enter a name for the leaderboard and the MLflow experiment.", examples=["small-models"]
    )
    models: Models = Field(
        description="List the models: Hub repos and local folders.", examples=[["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"]]
    )
    recipe: Template = Field(description="What is done with each model. Every variant becomes a run of its own.")
    limit: int | None = Field(
        None,
        ge=1,
        description="Enter how many runs may wait or work at the same time. If it is empty, all are started at once.",
    )
    device: Device = Field("auto", description=DEVICE)
    prefetch: bool = Field(
        False,
        description="Switch this on to let workers without a GPU download the models while the GPUs work. All workers "
        "must share one store (TAME_STORE).",
    )

    @model_validator(mode="after")
    def _publishes_apart(self) -> Self:
        _check_repo(self.models, self.recipe)
        if pattern := next((model for model in self.models if is_pattern(model)), None):
            raise ValueError(f"models has the pattern {pattern!r}; a sweep takes models by name")
        return self


def is_pattern(model: str) -> bool:
    """Whether `model` is a pattern, which stands for all models that match it."""
    return any(character in model for character in "*?[")


def _check_unmeasured(variants: list[Variant], gate: Gate) -> None:
    """Check that nothing is asked for that has to be measured, where `evaluate` is null."""
    if limits := [name for name, limit in gate if limit is not None]:
        raise ValueError(f"gate.{limits[0]} limits what is measured, and evaluate is null; remove one of them")
    for i, variant in enumerate(variants):
        if variant.fit is not None:
            raise ValueError(f"variants.{i}.fit keeps what is measured, and evaluate is null; remove one of them")
        if variant.checkpoint is not None:
            raise ValueError(
                f"variants.{i}.checkpoint is there to be measured, and evaluate is null; remove one of them"
            )


def _check_repo(models: list[str], template: Template) -> None:
    if len(set(models)) != len(models):
        raise ValueError(f"models has {next(m for m in models if models.count(m) > 1)!r} twice")
    several = len(models) > 1 or is_pattern(models[0])
    publish = template.publish
    if publish.to != "nowhere" and several and not re.search(r"\{(model|name)\}", publish.repo):
        raise ValueError(f"recipe.publish.repo {publish.repo!r} is the same for every model; put {{model}} in it")


def name_of(text: str) -> str:
    """Make a `Name` of `text`: me/my-model becomes me--my-model. A text that is too long is cut and gets a digest at its end."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text.strip("/").replace("/", "--")).strip("-._") or "model"
    return name if len(name) <= 80 else f"{name[:71]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
