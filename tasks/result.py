"""What a run says of itself: result.json, and what the report, the card and MLflow are made from.

A result begins with every variant failed, as `not reached`, and each stage that finishes replaces what it knows better:
whatever happens, what is written says what is true so far.
"""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from configs.errors import BadInputError, TameError, line, named_line
from configs.schema import Recipe, Variant
from configs.settings import home
from tasks.fitted import Fitted
from tasks.quantize.methods import libraries
from tasks.quantize.preview import parameters_of
from tasks.runtime.device import hardware, versions
from tasks.runtime.files import write_text
from tasks.values import (
    AdapterOf,
    Answer,
    Calibration,
    Evaluation,
    Protocol,
    Published,
    Quantized,
    Sample,
    Served,
    Snapshot,
    Unquantized,
    Verdict,
)


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class ResultSource(_Value):
    """What was started from. `digest` covers the content of all files used; `commit` is None for local sources."""

    model: str
    revision: str | None
    commit: str | None
    digest: str
    files: dict[str, str]
    adapter: AdapterOf | None = None
    """The LoRA adapter that was merged into it; `digest` and `files` are then those of the merged model."""
    licence: str | None = None
    """The base model's licence id from its card, if it has one."""
    card: dict[str, Any] = {}
    """The front matter of the base model's card, for what the published card inherits: language, licence, datasets."""


class ResultArtifact(_Value):
    """Where a quantized checkpoint lies, the sha256 over all its files, and its size in bytes."""

    path: str
    digest: str
    bytes: int
    files: dict[str, str] = {}


class Measured(_Value):
    """The baseline or a variant, measured."""

    name: str
    metrics: dict[str, float] = {}
    """By the contract's names. Intervals are `<name>_low` and `<name>_high`."""
    protocol: Protocol = Protocol()
    """What makes the numbers comparable: text, window, tokens scored, dtype, batch size, device."""
    notes: list[str] = []
    """Sentences that a reader of the numbers should know."""
    samples: list[Sample] = []
    """One for each prompt."""
    evidence: str | None = None
    """Folder of the evaluation artifact: per-window and per-sample results."""
    cached: list[str] = []
    """Which stages came from the cache: quantize, evaluate; weights where they were compared, and nothing measured."""
    measured: bool = True
    """False where the recipe says `evaluate: null`: no model was run, and the metrics are of files alone."""

    @property
    def all_cached(self) -> bool:
        """Whether nothing had to be done for it."""
        return not self.measured or "evaluate" in self.cached


class ResultVariant(Measured):
    """One variant and what became of it."""

    status: Literal["published", "passed", "rejected", "measured", "failed"]
    """`measured`: somebody else's checkpoint, which the gate does not judge and nobody publishes."""
    spec: Variant
    gate: Verdict | None = None
    artifact: ResultArtifact | None = None
    calibration: Calibration | None = None
    """What its codes were chosen on, if they were."""
    left: list[Unquantized] = []
    """What stayed in 16 bits."""
    fit: Fitted | None = None
    """How the mix of quantized and unquantized modules was found, where the variant has a limit."""
    served: list[Served] = []
    """What the programs that the recipe names have made of it."""
    published: str | None = None
    """URL of the Hub commit or the folder."""
    error: str | None = None

    @property
    def all_cached(self) -> bool:
        """Whether nothing had to be done for it."""
        compared = "evaluate" if self.measured else "weights"
        return "quantize" in self.cached and (compared in self.cached or (not self.measured and self.evidence is None))

    @property
    def made_as(self) -> Variant:
        """What it was quantized as: its limit, if it has one, replaced by what that came to."""
        return self.fit.mix(self.spec) if self.fit else self.spec


class Result(_Value):
    """result.json."""

    recipe: Recipe
    source: ResultSource
    baseline: Measured | None
    variants: list[ResultVariant]
    versions: dict[str, str]
    """Of Python, tame and the libraries that decide the numbers."""
    hardware: dict[str, Any]
    """{device, cpu, cores, memory_bytes, gpus}."""
    started: str
    """ISO 8601, UTC."""
    seconds: float
    prefect_run: str | None = None
    mlflow_run: str | None = None
    approval: Answer | None = None
    """What a person said before anything was published, where the recipe asks for that."""
    error: str | None = None
    """What ended the run before its variants, in one line."""
    exit_code: int = 1
    """0 all passed and published, 1 something failed, 2 the recipe or source is wrong, 3 the gate rejected."""

    def variant(self, label: str) -> ResultVariant:
        """The variant named `label`."""
        return next(variant for variant in self.variants if variant.name == label)

    def plain_of(self, variant: ResultVariant) -> ResultVariant | None:
        """The variant that is the same but for calibrating, if the recipe has it; none of a fitted one, whose size is its own."""
        if not variant.spec.calibrate or variant.spec.fit:
            return None
        same = variant.spec.model_copy(update={"calibrate": False}).identity
        return next((other for other in self.variants if other.spec.identity == same), None)

    def with_variant(self, variant: ResultVariant) -> Self:
        """This result with one variant replaced, and the exit code and time that follow."""
        variants = [variant if old.name == variant.name else old for old in self.variants]
        statuses = {variant.status for variant in variants}
        code = 1 if "failed" in statuses else 3 if "rejected" in statuses else 0
        return self.model_copy(update={"variants": variants, "exit_code": code, "seconds": self._elapsed()})

    def with_source(self, snapshot: Snapshot, licence: str | None, card: dict[str, Any] | None = None) -> Self:
        """This result with the source that was found."""
        source = ResultSource(
            model=snapshot.model,
            revision=snapshot.revision,
            commit=snapshot.commit,
            digest=snapshot.digest,
            files=snapshot.files,
            adapter=snapshot.adapter,
            licence=licence,
            card=card or {},
        )
        return self.model_copy(update={"source": source})

    def with_baseline(self, baseline: Evaluation | None, snapshot: Snapshot) -> Self:
        """This result with the baseline's numbers; with its sizes alone where it was not measured."""
        folder = Path(snapshot.path)
        sizes = sizes_of(folder, list(snapshot.files))
        sizes["bits_per_weight"] = 8 * sizes["size_bytes"] / parameters_of(folder)
        known = measured(baseline, sizes) if baseline else Measured(name="baseline", metrics=sizes, measured=False)
        return self.model_copy(update={"baseline": known})

    def ended_by(self, error: BaseException) -> Self:
        """This result, ended early: every variant that was not done has failed for that reason."""
        text = named_line(error, limit=None)
        variants = [
            variant.model_copy(update={"error": text}) if variant.error == NOT_REACHED else variant
            for variant in self.variants
        ]
        code = 2 if isinstance(error, BadInputError) else 1
        return self.model_copy(
            update={"variants": variants, "error": text, "exit_code": code, "seconds": self._elapsed()}
        )

    def _elapsed(self) -> float:
        return round(time.time() - datetime.fromisoformat(self.started).timestamp(), 3)


NOT_REACHED = "not reached"
NOTHING_MEASURED = (
    "It was not measured (evaluate: null): tame has not run it, and nobody knows what quantizing it cost."
)


def begin(recipe: Recipe, prefect_run: str | None) -> Result:
    """The result of a run that has done nothing yet."""
    variants = [ResultVariant(name=v.label, status="failed", spec=v, error=NOT_REACHED) for v in recipe.variants]
    return Result(
        recipe=recipe,
        source=ResultSource(
            model=recipe.source.model, revision=recipe.source.revision, commit=None, digest="", files={}
        ),
        baseline=None,
        variants=variants,
        versions=versions(*libraries()),
        hardware=hardware(),
        started=datetime.now(UTC).isoformat(timespec="milliseconds"),
        seconds=0.0,
        prefect_run=prefect_run,
    )


def failed(before: ResultVariant, error: BaseException) -> ResultVariant:
    """A variant that failed, with whatever was known of it before."""
    return before.model_copy(update={"status": "failed", "error": named_line(error, limit=None)})


def quantized(before: ResultVariant, made: Quantized, fitted: Fitted | None = None) -> ResultVariant:
    """A variant whose checkpoint is there."""
    return before.model_copy(
        update={
            "artifact": ResultArtifact(path=made.path, digest=made.digest, bytes=made.bytes, files=made.files),
            "metrics": {
                **sizes_of(Path(made.path), list(made.files)),
                "bits_per_weight": made.bits_per_weight,
                "quantized_share": made.quantized_share,
            },
            "calibration": made.calibration,
            "left": made.left,
            "fit": fitted,
            "notes": [*made.notes, *([fitted.sentence] if fitted else [])],
            "cached": ["quantize"] if made.cached else [],
        }
    )


def found(before: ResultVariant, snapshot: Snapshot) -> ResultVariant:
    """Somebody else's checkpoint, on this disk."""
    folder = Path(snapshot.path)
    sizes = sizes_of(folder, list(snapshot.files))
    size = sum((folder / name).stat().st_size for name in snapshot.files)
    return before.model_copy(
        update={
            "artifact": ResultArtifact(path=snapshot.path, digest=snapshot.digest, bytes=size, files=snapshot.files),
            "metrics": sizes,
            "notes": [
                f"{before.name} is {snapshot.model}{f' at {snapshot.commit[:12]}' if snapshot.commit else ''}, not tame's"
            ],
            "cached": ["quantize"],
        }
    )


def judged(before: ResultVariant, evaluation: Evaluation, verdict: Verdict | None) -> ResultVariant:
    """A variant that was measured and judged; `verdict` is None for somebody else's."""
    numbers = measured(evaluation, before.metrics)
    return before.model_copy(
        update={
            **{name: getattr(numbers, name) for name in ("metrics", "protocol", "samples", "evidence")},
            "notes": [*before.notes, *numbers.notes],
            "cached": [*before.cached, *numbers.cached],
            "gate": verdict,
            "status": "measured" if verdict is None else "passed" if verdict.passed else "rejected",
            "error": None,
        }
    )


def unmeasured(before: ResultVariant, weights: Evaluation | None) -> ResultVariant:
    """A variant that nobody measures; `weights` has what its files tell, beside the source's."""
    known = measured(weights, before.metrics) if weights else before.model_copy(update={"notes": []})
    cached = [*before.cached, *(["weights"] if weights and weights.cached else [])]
    update = {
        "metrics": known.metrics,
        "evidence": known.evidence,
        "notes": [NOTHING_MEASURED, *before.notes, *known.notes],
    }
    return before.model_copy(update={**update, "cached": cached, "measured": False, "status": "passed", "error": None})


def published(before: ResultVariant, done: Published) -> ResultVariant:
    """A variant that is where the recipe wants it."""
    return before.model_copy(update={"status": "published", "published": done.url})


def refused(before: ResultVariant, answer: Answer) -> ResultVariant:
    """A variant that kept the limits, and that a person did not choose: their no counts as the gate's."""
    checked = before.gate.checked if before.gate else []
    verdict = Verdict(passed=False, reasons=[line(answer.no, limit=500)], checked=checked)
    return before.model_copy(update={"status": "rejected", "gate": verdict})


def measured(evaluation: Evaluation, sizes: dict[str, float]) -> Measured:
    """An evaluation, and the sizes that are known without one."""
    return Measured(
        name=evaluation.name,
        metrics={**sizes, **evaluation.metrics},
        protocol=evaluation.protocol,
        notes=evaluation.notes,
        samples=evaluation.samples,
        evidence=evaluation.path,
        cached=["evaluate"] if evaluation.cached else [],
    )


def sizes_of(folder: Path, names: list[str]) -> dict[str, float]:
    """`size_bytes`: the weight files of a checkpoint together."""
    return {"size_bytes": float(sum((folder / name).stat().st_size for name in names if name.endswith(".safetensors")))}


def folder_of(recipe: Recipe, out: str | None) -> Path:
    """Where a run's result goes: `out`, or TAME_HOME/runs/NAME."""
    return Path(out).expanduser().absolute() if out else home() / "runs" / recipe.name


def write(result: Result, folder: Path) -> Path:
    """Write `folder`/result.json, whole or not at all, and return its path.

    Raises:
        TameError: the file cannot be written.
    """
    return write_file(folder / "result.json", result.model_dump_json(indent=1) + "\n")


def write_file(path: Path, text: str) -> Path:
    """Write `text` to `path`, whole or not at all.

    Raises:
        TameError: the file cannot be written.
    """
    try:
        return write_text(path, text)
    except OSError as error:
        raise TameError(
            f"{path}: {error.strerror or error}; make it writable, or give another folder with --out"
        ) from None
