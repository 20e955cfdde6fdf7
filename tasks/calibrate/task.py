"""From a snapshot and texts to calibration sequences in the artifact store: the plain function, and its key."""

from pathlib import Path
from typing import Any

from configs.schema import Calibrate
from tasks.calibrate.sequences import Part, check_length, load_texts, make_sequences
from tasks.runtime.child_process import isolated
from tasks.runtime.device import versions
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Calibration, CalibrationText, Snapshot

VERSION = 1  # of this stage: raise it when the same inputs give other sequences
LIBRARIES = ("transformers", "tokenizers")
NO_TOKENIZER = (".safetensors", "config.json")
"""How the names of files end that do not decide tokens, tokenizer_config.json aside."""


def calibration_inputs(snapshot: Snapshot, spec: Calibrate, digests: list[str], part: Part) -> dict[str, Any]:
    """Everything that decides the sequences, for the store's key."""
    deciding = {
        name: digest
        for name, digest in snapshot.files.items()
        if name.endswith("tokenizer_config.json") or not name.endswith(NO_TOKENIZER)
    }
    return {
        "texts": digests,
        "sequences": spec.sequences,
        "length": spec.length,
        **({"part": part} if part != "all" else {}),
        "tokenizer": deciding,
        "trust_remote_code": snapshot.trust_remote_code,
        "stage": VERSION,
        "versions": {name: found for name, found in versions().items() if name in LIBRARIES},
    }


def calibrate(snapshot: Snapshot, spec: Calibrate, part: Part = "all") -> Calibration:
    """The sequences that a snapshot's calibrated variants share: from the store, or made now.

    Raises:
        BadInputError: a text that cannot be read or is too short, sequences longer than the model takes, no tokenizer.
        TameError: the Hub cannot be reached and a data set is not cached.
    """
    folder = Path(snapshot.path)
    check_length(spec, folder)
    texts = load_texts(spec)

    def make(out: Path) -> on_disk.Made:
        counts = isolated("calibrate", make_sequences, texts, spec, folder, snapshot.trust_remote_code, out, part)
        return on_disk.Made(meta={"counts": counts})

    artifact, cached = store.build(
        "calibration", calibration_inputs(snapshot, spec, [text.digest for text in texts], part), make, shared=False
    )
    counts: list[int] = artifact.meta["counts"]
    notes = [
        f"The calibration text {text.name} has {count} sequences of {spec.length} tokens; {spec.sequences} were asked for."
        for text, count in zip(texts, counts, strict=True)
        if count < spec.sequences
    ]
    return Calibration(
        path=artifact.path,
        digest=artifact.digest,
        texts=[
            CalibrationText(
                name=text.name, sha256=text.digest, revision=text.revision, characters=len(text.text), sequences=count
            )
            for text, count in zip(texts, counts, strict=True)
        ],
        sequences=sum(counts),
        length=spec.length,
        notes=notes,
        cached=cached,
    )
