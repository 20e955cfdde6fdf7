"""From a checkpoint to what a runtime makes of it: the plain function, and its key."""

import json
import math
from pathlib import Path
from typing import Any

from tasks.runtime.child_process import isolated
from tasks.runtime.device import held, name_of, pick, versions
from tasks.serve.reference import NEW_TOKENS, PROMPTS, Reference, reference
from tasks.serve.runtimes import RUNTIMES, ask, own_version, versions_of
from tasks.store import artifacts as store
from tasks.store import on_disk
from tasks.values import Checkpoint, Served

STAGE = 5  # raise it when what is asked, or how it is compared, changes
RESULT = "result.json"
CLOSE = 0.05
"""Nats: the mean difference of log-probabilities up to which a runtime computes the same. bfloat16 and another order of sums
make 0.01 to 0.05."""
ROUNDINGS = 1.5
"""So many times as far as transformers in 16 bits a runtime may be, where that is more: activations in 8 bits make 0.1 to 0.2."""
TIE = 0.25
"""Nats: how much less likely another token may be that a runtime chooses: two steps of bfloat16 between logits of 16 to 32. It
may be twice the largest rounding of transformers in 16 bits, where that is more: both tokens are rounded."""
LORA = {"rank": 8, "rate": 1e-3, "steps": 5}
"""What a runtime that trains is asked to train, with Adam: enough that a loss falls far more than rounding moves it."""


def serve(checkpoint: Checkpoint, runtime: str, trust_remote_code: bool = False, *, device: str = "auto") -> Served:
    """Open a checkpoint with a runtime, and compare what it computes with transformers: from the store, or tried now.

    Args:
        checkpoint: The checkpoint.
        runtime: A key of RUNTIMES.
        trust_remote_code: Whether its own code may run.
        device: Where transformers runs; a runtime takes the GPU where there is one.

    Raises:
        BadInputError: the runtime has no environment; or the checkpoint is not a language model.
        TameError: transformers itself does not load it, or the runtime was killed or had no memory, which is not kept.
    """
    device = pick(device)
    found = versions_of(runtime)
    inputs: dict[str, Any] = {
        "model": checkpoint.digest,
        "runtime": runtime,
        "versions": found,
        "reference": versions("torch", "transformers"),
        "device": name_of(device),
        "trust_remote_code": trust_remote_code,
        "prompts": list(PROMPTS),
        "new_tokens": NEW_TOKENS,
        "stage": STAGE,
    }
    lora: dict[str, Any] = {"lora": LORA} if RUNTIMES[runtime].trains else {}
    inputs |= lora

    def make(folder: Path) -> on_disk.Made:
        with held():
            ours = isolated(
                f"transformers opens {checkpoint.label}", reference, checkpoint.path, device, trust_remote_code
            )
            asked = {"model": checkpoint.path, "trust_remote_code": trust_remote_code, **lora}
            answer = ask(runtime, {**asked, "prompts": ours.prompts, "continuations": ours.continuations})
        (folder / "evidence.json").write_text(json.dumps({"reference": ours._asdict(), "answer": answer}))
        tried = Served(
            runtime=runtime,
            title=RUNTIMES[runtime].title,
            version=str(own_version(runtime, found)),
            versions=found,
            device=name_of(device),
            opened=False,
        )
        (folder / RESULT).write_text(compare(tried, ours, answer).model_dump_json())
        return on_disk.Made()

    artifact, cached = store.build("served", inputs, make)
    served = Served.model_validate_json((Path(artifact.path) / RESULT).read_bytes())
    return served.model_copy(update={"cached": cached})


def compare(tried: Served, ours: Reference, answer: dict[str, Any]) -> Served:
    """`tried` with what the answer of a runtime says, compared with what transformers computes.

    A greedy answer counts up to its first other token: what comes after it answers another question. That token may be as likely
    as ours, within TIE. A runtime that trains must also lower the loss: the last is below the first, not each below the one before.
    """
    if "greedy" not in answer:
        return tried.model_copy(update={"error": answer["error"]})
    if not all(math.isfinite(each) for row in answer["logprobs"] for each in row):
        error = "its log-probabilities are NaN or infinite"
        return tried.model_copy(update={"device": answer["device"], "opened": True, "error": error})
    pairs = zip(ours.logprobs, answer["logprobs"], strict=True)
    differences = [abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)]
    same, gaps = 0, [0.0]
    for mine, theirs, likely in zip(ours.continuations, answer["greedy"], ours.likely, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), len(mine))
        same += first
        if first < len(mine):
            known = {int(token): score for token, score in likely[first].items()}
            gaps.append(max(known.values()) - known.get(theirs[first], min(known.values())))
    mean = sum(differences) / len(differences)
    rounded = [each for row in ours.rounding or [] for each in row]
    rounding = sum(rounded) / len(rounded) if rounded else None
    found = tried.model_copy(
        update={
            "device": answer["device"],
            "opened": True,
            "rounding": rounding,
            "agrees": mean <= max(CLOSE, ROUNDINGS * (rounding or 0.0))
            and max(gaps) <= max([TIE, *(2 * each for each in rounded)]),
            "prompts": len(ours.prompts),
            "tokens": len(differences),
            "difference": mean,
            "largest": max(differences),
            "same": same,
            "answered": sum(len(each) for each in ours.continuations),
            "gap": max(gaps),
        }
    )
    return _trained(found, answer) if RUNTIMES[tried.runtime].trains and found.agrees else found


def _trained(found: Served, answer: dict[str, Any]) -> Served:
    """`found`, which computes the same, with what came of a LoRA: it agrees no more if the loss is not finite and lower."""
    losses: list[float] = answer.get("losses", [])
    if not (losses and all(map(math.isfinite, losses))):
        untrained = "its loss is NaN or infinite" if losses else answer["error"]
        return found.model_copy(update={"agrees": False, "untrained": untrained})
    return found.model_copy(
        update={
            "agrees": losses[-1] < losses[0],
            "steps": len(losses) - 1,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    )
