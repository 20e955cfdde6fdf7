"""Is a release what it says it was made from? Some of its tensors are computed again from the source, byte for byte.

Neither model is downloaded: of the source, and of the release, the headers and the tensors that were chosen are read. So
anybody can check a model of any size in seconds, and need not trust who published it.

Codes that were calibrated depend on the activations of the whole model, and cannot be computed from one tensor. Of such a
release only the tensors that are copied are compared, and that is said.
"""

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.errors import BadInputError, TameError, line
from configs.schema import Variant
from tasks.formatting import figure
from tasks.publish import provenance
from tasks.publish.ranges import RangedFiles, files_of
from tasks.quantize.methods import method_of, method_of_source
from tasks.runtime.child_process import isolated
from tasks.runtime.device import pick, versions
from tasks.runtime.progress import Progress, show

if TYPE_CHECKING:
    from tasks.quantize.layout import Job, Layout
    from tasks.quantize.packed import Packed

COPIED_AT_ONCE = 1 << 26  # bytes of a tensor that is copied: of a larger one, a piece is compared


class Rederived(BaseModel):
    """What came of computing tensors of a release again."""

    model_config = ConfigDict(frozen=True)

    source: str
    """The model that they were computed from, with its commit."""
    checked: list[str]
    """The tensors of the release that were compared, or of which a piece was."""
    of: int
    """How many tensors the release has."""
    problems: list[str]
    """A line for each that differs."""
    notes: list[str]
    """What was not compared, and why."""
    source_bytes: int
    release_bytes: int
    """Bytes that were read."""
    seconds: float

    def lines(self, repo: str) -> list[str]:
        """What a person should read: each thing that is wrong, or that nothing is, then what was not compared."""
        read = f"{figure('size_bytes', self.source_bytes)} read of it, {figure('size_bytes', self.release_bytes)} of the release"
        what = f"{len(self.checked)} of {self.of} tensors, computed again from {self.source}"
        same = f"{repo}: {what}, are the same, byte for byte ({read}, {self.seconds:.1f} s)"
        record = self.problems or [same]
        return [*record, *(f"note: {note}" for note in self.notes)]


def rederive(repo: str, count: int, source: str | None = None, progress: Progress = show) -> Rederived:
    """Choose `count` tensors of a release at random, compute them again from the source, and compare every byte.

    Args:
        repo: The release: a Hub repo, or a folder.
        count: How many tensors of the source are taken; each is one or more tensors of the release.
        source: The folder or repo of the source, where it is not the one that tame.json names.
        progress: Told what is done.

    Raises:
        BadInputError: no such repo, not published by tame, or a source that cannot be read in parts.
        TameError: a file or header that is damaged. UnreachableError: the Hub does not answer.
    """
    if count < 1:
        raise BadInputError(f"--rederive is {count}: expected a number of tensors, 1 or more")
    return isolated(f"check {repo}", _rederive, repo, count, source, progress=progress)


def _rederive(repo: str, count: int, source: str | None, progress: Progress) -> Rederived:
    started = time.monotonic()
    release = files_of(repo)
    record = _record(release)
    variant = _variant(release.name, record)
    original = _source(record, source)
    with original.skeleton() as folder, release.skeleton() as made:
        layout, packed = _layout(folder, variant, original)
        stored = release.tensors(made)
        problems = _names(layout, stored.keys()) + _config(folder, made, layout)
    pieces = [piece for job in layout.jobs for piece in job.split(COPIED_AT_ONCE)]
    notes = []
    if variant.calibrate:
        pieces = [piece for piece in pieces if not piece.quantized]
        notes.append(
            "its codes were calibrated, which one tensor alone does not tell: only tensors that are copied were compared; "
            "to check the codes, quantize the source again with the same calibration"
        )
    chosen = random.SystemRandom().sample(pieces, min(count, len(pieces)))
    from tasks.quantize.single import SingleTensors

    computing = SingleTensors(original.name, original.read, layout.variant, pick(), packed)
    checked: list[str] = []
    for number, job in enumerate(chosen):
        progress(f"check {repo}", number, len(chosen))
        outputs = computing.outputs(job)
        checked += outputs
        for name, data in outputs.items():
            if name not in stored:
                continue  # `_names` has said so
            file, start, end = stored[name].file, stored[name].start + job.at, stored[name].end
            whole = job in layout.jobs  # and no piece of a larger tensor
            if start + len(data) > end or (whole and start + len(data) != end):
                problems.append(f"{name} has {end - stored[name].start} bytes; the source gives {job.at + len(data)}")
            elif (published := release.read(file, start, len(data))) != data:
                problems.append(_difference(name, published, data, job))
    progress(f"check {repo}", len(chosen), len(chosen))
    if any("differs" in problem for problem in problems):
        notes += _why(record)
    return Rederived(
        source=original.name + (f" at {commit[:12]}" if (commit := record["source"].get("commit")) else ""),
        checked=checked,
        of=len(stored),
        problems=problems,
        notes=notes,
        source_bytes=original.bytes_read,
        release_bytes=release.bytes_read,
        seconds=time.monotonic() - started,
    )


def _record(release: RangedFiles) -> dict[str, Any]:
    """The release's tame.json, with the keys that are read here."""
    if provenance.NAME not in release.sizes:
        raise BadInputError(f"{release.name}: there is no {provenance.NAME}: tame did not publish this")
    try:
        record: dict[str, Any] = json.loads(release.read(provenance.NAME, 0, release.sizes[provenance.NAME]))
        if not isinstance(record["source"]["model"], str):
            raise TypeError("source.model")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{release.name}: {provenance.NAME} names no source ({line(error)}), so nothing can be computed"
        ) from None
    return record


def _variant(name: str, record: dict[str, Any]) -> Variant:
    try:
        return Variant.model_validate(record["variant"]["spec"])
    except (KeyError, TypeError, ValidationError) as error:
        raise BadInputError(
            f"{name}: {provenance.NAME} says of no variant that this tame can make ({line(error)})"
        ) from None


def _source(record: dict[str, Any], given: str | None) -> RangedFiles:
    """The files of the source: of `given`, or of the Hub repo that the release names, at the commit that it names."""
    model, commit = record["source"]["model"], record["source"].get("commit")
    if given is None and (adapter := record["source"].get("adapter")):
        raise BadInputError(
            f"it was made from {model} with the adapter {adapter['model']} merged into it; merge it, and name the folder with "
            "--source"
        )
    if given is None and not commit:
        raise BadInputError(
            f"it was made from {model}, which is no repo of the Hub; name a folder that holds it as safetensors with --source"
        )
    found = files_of(given or model, None if given else commit)
    if "config.json" not in found.sizes:
        raise BadInputError(f"{found.name}: no config.json; its tensors cannot be read in parts")
    return found


def _layout(folder: Path, variant: Variant, original: RangedFiles) -> "tuple[Layout, dict[str, Packed]]":
    """What the release has to be, and which weights of the source are packed: read as what they stand for."""
    from tasks.quantize.layout import lay_out
    from tasks.quantize.packed import unpacked
    from tasks.runtime.quiet import quieten

    quieten()

    def fill(name: str, start: int, data: memoryview) -> None:
        data[:] = original.read(name, start, len(data))

    try:
        tensors, packed = unpacked(folder, original.tensors(folder), method_of_source(folder), fill)
        return lay_out(folder, method_of(variant), variant, tensors), packed
    except TameError as error:
        raise type(error)(str(error).replace(str(folder), original.name)) from None


def _names(layout: "Layout", release: Any) -> list[str]:
    """Tensors that the source gives and the release lacks, and the reverse."""
    missing, more = sorted(layout.outputs.keys() - release), sorted(release - layout.outputs.keys())
    return [f"{name} is missing" for name in missing] + [f"{name} does not come from the source" for name in more]


def _config(folder: Path, made: Path, layout: "Layout") -> list[str]:
    """Keys of config.json that are not what quantizing the source gives."""
    try:
        expected = {**json.loads((folder / "config.json").read_bytes()), **layout.config}
        found = json.loads((made / "config.json").read_bytes())
        keys = (expected.keys() | found.keys()) - {"auto_map"}
    except (OSError, ValueError, AttributeError) as error:
        return [f"config.json cannot be read ({line(error)})"]
    wrong = sorted(key for key in keys if expected.get(key) != found.get(key))
    return [f"config.json: {key} is not what the source gives" for key in wrong]


def _difference(name: str, published: bytes, computed: bytes, job: "Job") -> str:
    first = next(at for at, (one, other) in enumerate(zip(published, computed, strict=True)) if one != other)
    return f"{name} differs from what {job.source.name} gives, first at byte {job.at + first}"


def _why(record: dict[str, Any]) -> list[str]:
    """What could be an innocent reason for bytes that differ: other libraries, or another kind of device."""
    here, then = versions(), record.get("versions") or {}
    other = [
        f"{name} {then[name]}, here {here[name]}" for name in sorted(here.keys() & then) if here[name] != then[name]
    ]
    notes = [f"it was made with {', '.join(other)}"] if other else []
    device = str(((record.get("run") or {}).get("hardware") or {}).get("device", pick()))
    if device.partition(":")[0] != pick().partition(":")[0]:
        notes.append(f"it was made on {device}, and computed again on {pick()}, which need not round alike")
    return notes
