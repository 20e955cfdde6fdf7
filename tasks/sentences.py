"""A release in sentences: how it ended, which variant to use and why, what its figures mean; and all of it on a page of Markdown.

Every place that tells a person of a release (the terminal, Prefect, MLflow, the report, the card, the approval) takes them here.
"""

import re

from configs.errors import line
from tasks.decision import Choice, decide
from tasks.formatting import NOT_MEASURED, VERDICTS, cell, figure, label, plain, rows, verdict
from tasks.metrics import pessimistic
from tasks.result import Measured, Result, ResultVariant


def outcome(result: Result) -> str:
    """The release in a word, the worst of its variants': Failed, Rejected, Passed or Published."""
    verdicts = {verdict(variant) for variant in result.variants}
    return next(word.capitalize() for word in VERDICTS if word in verdicts)


def ending(statuses: set[str]) -> str:
    """The name of the state that a run ends in which has not failed, by the statuses of its variants.

    Rejected only where nothing passed: beside four variants that were published, one that was rejected is no reason to stop.
    """
    if "rejected" not in statuses:
        return "Completed"
    return "Partly rejected" if statuses - {"rejected", "measured", "baseline"} else "Rejected"


def tally(result: Result) -> str:
    """How its variants fared, the best first: `4 published, 1 rejected`; in a word where all fared alike: `passed`.

    What was published has passed, if it was measured, so that a release of published variants alone is `passed`, too.
    """
    verdicts = [verdict(variant) for variant in result.variants]
    if len(set(verdicts)) == 1:
        return {"published": "passed"}.get(verdicts[0], verdicts[0])
    return ", ".join(f"{verdicts.count(word)} {word}" for word in reversed(VERDICTS) if word in verdicts)


def short(result: Result) -> str:
    """The release as a name says it: `use nf4-cal (57 % smaller than the original, KL up to 0.05) – 4 published, 1 rejected`."""
    if result.error:
        return "failed"
    choices = decide(result).choices
    if not choices:
        return f"use none – {tally(result)}"
    first = choices[0]
    worth = [] if first.smaller is None else [f"{_smaller(first.smaller)} than {_original(result)}"]
    worth += [_cost(first)] if first.damage else []
    return (
        f"use {first.name} ({', '.join(worth)}) – {tally(result)}" if worth else f"use {first.name} – {tally(result)}"
    )


def headline(result: Result) -> str:
    """The release in a line, the worst first: `Rejected: nf4 (KL up to 0.131 > limit 0.1). Published: int8`."""
    parts = [f"Failed: {line(result.error, limit=None)}"] if result.error else []
    judged = [variant for variant in result.variants if not result.error or variant.error != result.error]
    for said in VERDICTS:
        variants = [variant for variant in judged if verdict(variant) == said]
        if variants:
            parts.append(f"{said.capitalize()}: {'; '.join(map(_why, variants))}")
    return ". ".join(parts)


def advice(result: Result) -> str:
    """What to use of a release and why, in a sentence: `tasks.decision`'s rule in words. Empty where there are no variants."""
    decision = decide(result)
    if not decision.choices:
        return "" if result.error else "Use none of these: no variant passed."
    first, *others = decision.choices
    parts = [f"{first.name}: {_worth(first, f' than {_original(result)}')}"]
    if decision.judged:
        parts[0] = f"Use {parts[0]}"
    elif result.recipe.evaluate is None:
        parts[0] = f"Nobody knows what is good enough: it was {NOT_MEASURED}. The smallest is {parts[0]}"
    else:
        parts[0] = f"No limit was set, so that nobody knows what is good enough. The smallest is {parts[0]}"
    return "; ".join(parts + [f"{one.name} {PURPOSES[one.purpose]}: {_worth(one)}" for one in others]) + "."


PURPOSES = {"use": "", "between": "for something in between", "closest": "if answers must be closest to the original's"}


def meaning(result: Result) -> str:
    """What the KL divergence is, for whoever meets it here first, and what the original is where the source is a .gguf.

    Empty where no KL divergence was measured.
    """
    if not any("kl_mean" in variant.metrics for variant in result.variants):
        return ""
    return f"{KL} {UNPACKED}" if _unpacked(result) else KL


KL = (
    "KL (KL divergence) is how far a variant's probabilities for the next token are from the original's: 0 means the same. "
    "“Up to” is the upper end of its 95 % interval. A limit is held against that end."
)

UNPACKED = (
    "The source is a .gguf file, which is quantized already. The original here is what that file holds, in 16 bits."
)


def markdown(result: Result) -> str:
    """The release on one screen of Markdown: decision, headline, a table of what matters most, what to know, where things are."""
    measured = rows(result)
    main = ("size_bytes", "perplexity", "kl_mean", "top1_agreement", "peak_memory_bytes", "decode_tokens_per_second")
    names = [name for name in main if any(name in row.metrics for row in measured)]
    lines = [f"**{plain(sentence)}**\n" for sentence in (advice(result), headline(result)) if sentence]
    lines += [f"{meaning(result)}\n"] if meaning(result) else []
    lines += [f"{plain(result.source.model)} at `{_commit(result)}`", ""]
    lines += ["| " + " | ".join(["variant", "verdict", *map(label, names)]) + " |"]
    lines += ["|" + " --- |" * (len(names) + 2)]
    for row in measured:
        cells = [verdict(row), *(cell(name, row.metrics) for name in names)]
        lines.append(f"| {marked(row, result)} | " + " | ".join(map(plain, cells)) + " |")
    notes = dict.fromkeys(note for row in measured for note in row.notes)
    lines += ["", *(f"- {plain(note)}" for note in notes)]
    lines += [
        f"- {plain(variant.name)}: {_address(variant.published)}" for variant in result.variants if variant.published
    ]
    return "\n".join(lines).rstrip() + "\n"


def marked(row: Measured, result: Result) -> str:
    """A name in a table of Markdown, bold where it is the one to use."""
    decision = decide(result)
    used = decision.judged and row.name in [choice.name for choice in decision.choices[:1]]
    return f"**{plain(row.name)}**" if used else plain(row.name)


def _worth(choice: Choice, than: str = "") -> str:
    """What a variant saves, and what it costs at the pessimistic end: `111.9 MB, 57 % smaller, KL up to 0.02 (limit 0.1)`."""
    size = figure("size_bytes", choice.size)
    if choice.smaller is not None:
        size = f"{size}, {_smaller(choice.smaller)}{than}"
    if choice.damage is None:
        return size
    return f"{size}, {_cost(choice)}" + ("" if choice.limit is None else f" (limit {choice.limit:g})")


def _original(result: Result) -> str:
    """What sizes are compared with. Of a GGUF file it is not the file, but what was read from it."""
    bits = result.baseline.metrics.get("bits_per_weight") if result.baseline else None
    return f"the original in {bits:.0f} bits" if bits is not None and _unpacked(result) else "the original"


def _unpacked(result: Result) -> bool:
    return result.source.model.lower().endswith(".gguf")


def _smaller(share: float) -> str:
    return f"{100 * abs(share):.0f} % {'smaller' if share >= 0 else 'larger'}"


def _cost(choice: Choice) -> str:
    """The pessimistic end of a choice's damage, which was measured: `KL up to 0.02`."""
    assert choice.damage is not None
    up_to = " up to" if choice.damage.high is not None else ""
    return f"{DAMAGE[choice.damage.name]}{up_to} {figure(choice.damage.name, pessimistic(choice.damage))}"


DAMAGE = {"kl_mean": "KL", "perplexity_ratio": "perplexity ratio"}


def _why(variant: ResultVariant) -> str:
    if variant.status == "failed":
        return f"{variant.name} ({line(variant.error or 'no reason given', limit=None)})"
    if variant.status == "rejected" and variant.gate:
        return f"{variant.name} ({', '.join(variant.gate.reasons)})"
    return variant.name


def _commit(result: Result) -> str:
    return result.source.commit or f"sha256 {result.source.digest[:12]}"


def _address(address: str) -> str:
    return f"<{address}>" if re.fullmatch(r"https?://[^\s<>]+", address) else f"`{address.replace('`', '')}`"
