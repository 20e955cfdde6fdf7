"""The values that pass between the stages, in the order in which they are made.

Small, frozen, and never models or tensors. This file imports nothing of tasks/, so that a stage can know what another one
makes without knowing how.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class FoundAdapter(_Value):
    """What a look at a LoRA adapter told."""

    model: str
    """As the recipe names it: a Hub repo or a folder."""
    path: str | None
    """The folder; None for a Hub repo."""
    commit: str | None
    revision: str
    files: dict[str, int]
    """Size in bytes of each file that will be taken."""
    sha256: dict[str, str] = {}
    base: str | None
    """The model that it says it was trained on."""
    base_revision: str = "main"


class AdapterOf(_Value):
    """An adapter that was merged into a snapshot. `digest` covers all its files."""

    model: str
    commit: str | None
    digest: str


class Found(_Value):
    """What a look at a source told, before anything is downloaded."""

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: str | None
    """The local folder or file; for a Hub repo, the cached folder if there is a complete one."""
    commit: str | None
    files: dict[str, int]
    """Size in bytes of each file that will be taken."""
    config: dict[str, Any]
    """config.json; empty for a .gguf."""
    counted: tuple[int, int, int] | None = None
    """Parameters in all, in linear layers that are no experts, and in experts, where a header tells, as that of a .gguf does."""
    top_tensors: list[str] | None = None
    """Names of the tensors that belong to no numbered layer, such as lm_head.weight; None where they are not known yet."""
    licence: str | None = None
    card: dict[str, Any] = {}
    """What of its card's front matter a card of a model made from it inherits."""
    gated: bool = False
    sha256: dict[str, str] = {}
    """What the Hub says of its large files."""
    adapter: FoundAdapter | None = None
    """What is merged into it on the way in."""
    quantized: bool = False
    """Whether it may be quantized already: to be measured, and not quantized again."""

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(self.files.values())


class Snapshot(_Value):
    """A source, pinned and on disk. `files` has the sha256 of every file that was taken, by its path in the folder."""

    path: str
    model: str
    """As the recipe names it."""
    name: str
    """Short name, for repo templates and titles: Qwen3-1.7B."""
    revision: str | None
    commit: str | None
    """The Hub commit; None for local sources."""
    files: dict[str, str]
    digest: str
    """sha256 over `files`: what every key downstream is made from."""
    adapter: AdapterOf | None = None
    trust_remote_code: bool = False
    cached: bool = False


class CalibrationText(_Value):
    """One of the texts that codes are chosen on, and how many sequences were taken from it."""

    name: str
    sha256: str
    revision: str | None = None
    """The Hub commit of a data set."""
    characters: int
    sequences: int


class Calibration(_Value):
    """Token sequences that codes are chosen on. `digest` covers all that decides them."""

    path: str
    """The folder of ids.safetensors: Int32 [sequences, tokens]."""
    digest: str
    texts: list[CalibrationText]
    sequences: int
    length: int
    """Tokens in a sequence."""
    notes: list[str] = []
    """Sentences on texts that had fewer sequences than were asked for."""
    cached: bool = False

    @property
    def sentence(self) -> str:
        """What a user should know of it, with as much of a digest as names a text."""
        texts = " and ".join(f"{text.sequences} of {text.name} (sha256 {text.sha256[:12]}…)" for text in self.texts)
        return (
            f"Calibrated: its 4-bit codes were chosen on {self.sequences} sequences of {self.length} tokens: {texts}."
        )


class Unquantized(_Value):
    """Modules that stay in 16 or 32 bits: a module's name, with `*` for layer numbers, and why."""

    module: str
    tensors: int
    parameters: int
    reason: str


class Quantized(_Value):
    """A quantized checkpoint. `files` has the sha256 of each, `digest` covers them all."""

    path: str
    digest: str
    bytes: int
    files: dict[str, str]
    parameters: int
    bits_per_weight: float
    """8 * bytes of the weight files / parameters."""
    quantized_share: float
    """Of the parameters, how many are quantized: 0 to 1."""
    left: list[Unquantized]
    """What is not quantized, largest first."""
    notes: list[str]
    """Sentences that a user of the model should know."""
    seconds: float
    """What it took, when it was made."""
    cached: bool
    calibration: Calibration | None = None
    """What its codes were chosen on, if they were."""


class EvaluatedText(_Value):
    """The text that a model was measured on."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "text"
    revision: str | None = None
    sha256: str | None = None


class Protocol(_Value):
    """What makes numbers comparable: device, text, and every setting that each part of an evaluation says it ran with.

    The settings (window, tokens scored, batch size, dtype, noise floor, tasks, …) are whatever the parts name; in JSON it is
    one flat object of what is known.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    device: str | None = None
    text: EvaluatedText | None = None

    def __bool__(self) -> bool:
        """Whether anything was measured."""
        return bool(self.model_fields_set)

    @model_serializer(mode="wrap")
    def _known(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {key: value for key, value in fields.items() if key in self.model_fields_set}


class Sample(_Value):
    """What the baseline and the model answered to a prompt; `diverges_at` is a character offset, or None."""

    prompt: str
    baseline: str
    answer: str
    diverges_at: int | None
    baseline_thought: str | None = None
    """What the baseline thought before it answered; None where it thought nothing."""
    thought: str | None = None


class Checkpoint(_Value):
    """A checkpoint on disk that is to be measured. `digest` is the sha256 over its files."""

    path: str
    digest: str
    label: str
    """What people call it: a variant's label, or a model's name."""


class EvaluatedPart(_Value):
    """A part of an evaluation, in the store: the folder that it was measured into, and the digest of that."""

    path: str
    digest: str


class Evaluation(_Value):
    """What was measured of the baseline or of a variant."""

    name: str
    metrics: dict[str, float]
    """By the contract's names; intervals are `<name>_low` and `<name>_high`, 95 %."""
    protocol: Protocol
    """What makes the numbers comparable."""
    notes: list[str]
    samples: list[Sample]
    """One for each prompt."""
    path: str
    """Folder of the evidence: windows.npz and windows.json, tasks/NAME.jsonl, flips.json, layers.json, evaluation.json."""
    digest: str
    cached: bool
    parts: dict[str, EvaluatedPart] = {}
    """What it was made from, for comparisons with it: scores, tasks/NAME, speed, samples, layers."""


class Served(_Value):
    """What became of a checkpoint in a program that people run models with, compared with transformers as tame has it."""

    runtime: str
    """By its key in recipes: vllm, transformers, peft."""
    title: str
    """What people call it."""
    version: str
    versions: dict[str, str]
    """Of the packages that decide what it opens."""
    device: str
    opened: bool
    agrees: bool = False
    """Whether it computes the same, as far as 16 bits allow; and, where it also trains, whether the loss falls."""
    rounding: float | None = None
    """How far transformers in 16 bits is from what it was compared with, transformers in float32, as `difference`; None where it
    was compared with 16 bits."""
    error: str | None = None
    """Why it does not open it, in the runtime's own words; or what is wrong with all that it computes."""
    prompts: int = 0
    tokens: int = 0
    """Tokens whose log-probabilities were compared."""
    difference: float = 0.0
    """Mean of the differences of these, without their signs, in nats."""
    largest: float = 0.0
    same: int = 0
    """Tokens of greedy answers that are the same, up to the first other one in each."""
    answered: int = 0
    """Tokens of greedy answers."""
    gap: float = 0.0
    """How much less likely, by transformers and in nats, a token was that the runtime chose instead: near 0, it was a tie."""
    steps: int = 0
    """How many a LoRA was trained for; 0 in a runtime that does not train, or could not, or computes something else."""
    first_loss: float | None = None
    """Before the first of these steps, in nats a token."""
    last_loss: float | None = None
    """After the last."""
    untrained: str | None = None
    """Why a LoRA on it could not be trained, in the runtime's own words."""
    cached: bool = False

    @property
    def sentence(self) -> str:
        """What a reader should know of it."""
        where = f"{self.title} {self.version} on {self.device}"
        if not self.opened:
            return f"{where} does not open it: {self.error}"
        if self.error:
            return f"{where} opens it, and {self.error}"
        arithmetic = " in float32" if self.rounding is not None else ""
        figures = (
            f"{self.same} of {self.answered} tokens of greedy answers are those of transformers{arithmetic}, and the "
            f"log-probabilities of {self.tokens} tokens differ by {self.difference:.3f} nats on average"
        )
        if self.rounding is not None:
            figures += f" ({self.rounding:.3f} where transformers computes in 16 bits)"
        trained = self._trained
        if not self.agrees and not trained:
            return f"{where} opens it, and computes something else: {figures}"
        rest = "" if self.same == self.answered else f"; other tokens were ties, by at most {self.gap:.2f} nats"
        return f"{where} opens it: {figures}{rest}{trained}"

    @property
    def _trained(self) -> str:
        """What became of a LoRA on it, as the end of a sentence."""
        if self.untrained:
            return f"; but a LoRA on it does not train: {self.untrained}"
        if self.first_loss is None or self.last_loss is None:
            return ""
        learns = "a LoRA on it learns" if self.agrees else "but a LoRA on it does not learn"
        return f"; {learns}: loss {self.first_loss:.3f} → {self.last_loss:.3f} in {self.steps} steps"


class Verdict(_Value):
    """Whether every limit was kept; `reasons` has a line for each one that was not, `checked` one for each that was."""

    passed: bool
    reasons: list[str]
    checked: list[str] = []


class Answer(_Value):
    """What a person said to the question what to publish."""

    variants: list[str]
    """Labels of those to publish; without any, nothing is published."""
    private: bool
    note: str = ""
    answered: bool = True
    """Whether somebody answered in time: if nobody did, that is a no."""

    @property
    def no(self) -> str:
        """Why a variant that was not chosen is not published."""
        if not self.answered:
            return "nobody approved it in time"
        if not self.variants and not self.note:
            return "a person answered, and nothing was chosen to be published"
        return f"a person did not approve it: {self.note}" if self.note else "a person did not approve it"


class Published(_Value):
    """What was published, and where. `commit` is None for folders; `uploaded` names the files that the target did not have yet."""

    to: str
    repo: str
    url: str
    commit: str | None
    visibility: str
    """`private`, `public`, or `local` for a folder."""
    uploaded: list[str]
    already: bool
    """Whether nothing had to be done."""
