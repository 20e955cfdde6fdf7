"""What a run says of itself: result.json, and what the report, the card and MLflow are made from."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tasks.gate import Verdict


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class ResultSource(_Value):
    """What was started from. `digest` covers the content of all files used; `commit` is None for local sources."""

    model: str
    revision: str | None
    commit: str | None
    digest: str
    files: dict[str, str]
    licence: str | None = None
    """The base model's licence id from its card, if it has one."""


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
    protocol: dict[str, Any] = {}
    """What makes the numbers comparable: text, window, tokens scored, dtype, batch size, device."""
    notes: list[str] = []
    """Sentences that a reader of the numbers should know."""
    samples: list[dict[str, Any]] = []
    """{prompt, baseline, answer, diverges_at} for each prompt; diverges_at is a character offset or None."""
    evidence: str | None = None
    """Folder of the evaluation artifact: per-window and per-sample results."""
    cached: list[str] = []
    """Which stages came from the cache: quantize, evaluate."""


class ResultVariant(Measured):
    """One variant and what became of it."""

    status: Literal["published", "passed", "rejected", "failed"]
    spec: dict[str, Any]
    gate: Verdict | None = None
    artifact: ResultArtifact | None = None
    left: list[dict[str, Any]] = []
    """What stayed in 16 bits: {module, tensors, parameters, reason}."""
    published: str | None = None
    """URL of the Hub commit or the folder."""
    error: str | None = None


class Result(_Value):
    """result.json."""

    recipe: dict[str, Any]
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
