"""What a person is asked before anything is published, and what is kept of it until they have answered.

What is shown is what is published: the cards and the other files are written when the question is asked, and kept in the artifact
store with the result, under the id of the flow run. After a yes nothing is made again. The weights are published by the digests
that the result names, and publishing compares them.
"""

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from configs.errors import NotCachedError, TameError
from tasks.formatting import figure, plain, rows, verdict
from tasks.metrics import pessimistic, read
from tasks.result import Result
from tasks.sentences import advice, headline, marked, meaning
from tasks.store import artifacts as store
from tasks.store.digests import sha256_file
from tasks.store.on_disk import Made

KIND = "shown"
SHORT = {"size_bytes": "size", "kl_mean": "KL up to", "top1_agreement": "same token"}
"""The columns of the question, which is shown in a narrow form. Of the KL it is the end that was judged."""


class Shown(BaseModel):
    """What somebody is asked about."""

    model_config = ConfigDict(frozen=True)

    result: Result
    targets: dict[str, str]
    """Where each variant would go, by its label."""
    documents: dict[str, dict[str, bytes]]
    """The files that tell of each variant, as they will be published: contents by name, by label."""

    @property
    def digest(self) -> str:
        """sha256 over everything that would be published, and where: an answer is for this alone."""
        lines = []
        for label, target in sorted(self.targets.items()):
            artifact = self.result.variant(label).artifact
            lines += [label, target, artifact.digest if artifact else ""]
            for name, content in sorted(self.documents[label].items()):
                lines += [name, hashlib.sha256(content).hexdigest()]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def keep(run: str, shown: Shown) -> None:
    """Keep what the flow run `run` asks about, for the process that goes on with it, on this machine or on another.

    Raises:
        TameError: the store cannot be written.
    """

    def write(folder: Path) -> Made:
        (folder / "result.json").write_text(shown.result.model_dump_json(), encoding="utf-8")
        (folder / "targets.json").write_text(json.dumps([*shown.targets.items()]), encoding="utf-8")
        for label, files in shown.documents.items():
            for name, content in files.items():
                path = folder / "documents" / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return Made()

    store.build(KIND, {"run": run}, write)


def recall(run: str) -> Shown | None:
    """What the flow run `run` has asked about; None if it has asked nothing yet.

    Raises:
        TameError: what was kept is not what was written.
    """

    def absent(_folder: Path) -> Made:
        raise NotCachedError("nothing was asked")

    try:
        kept, _ = store.build(KIND, {"run": run}, absent)
    except NotCachedError:
        return None
    folder = Path(kept.path)
    for name, digest in kept.files.items():
        if sha256_file(folder / name) != digest:
            raise TameError(f"{folder / name} is not what was shown, so nothing is published; run the recipe again")
    targets = dict(json.loads((folder / "targets.json").read_bytes()))
    documents: dict[str, dict[str, bytes]] = {label: {} for label in targets}
    for name in kept.files:
        if name.startswith("documents/"):
            _, label, file = name.split("/", 2)
            documents[label][file] = (folder / name).read_bytes()
    result = Result.model_validate_json((folder / "result.json").read_bytes())
    return Shown(result=result, targets=targets, documents=documents)


def question(shown: Shown, report: str, cards: dict[str, str], until: str) -> str:
    """The question as a page of Markdown: the verdicts, what would go where, and links to what it would say.

    Args:
        shown: What is asked about.
        report: Where the report is.
        cards: Where the card of each variant is, by its label.
        until: When not having answered becomes a no.
    """
    result = shown.result
    names = [name for name in SHORT if any(name in variant.metrics for variant in result.variants)]
    lines = [
        f"**{plain(sentence)}**\n" for sentence in (advice(result), headline(result)) if sentence
    ]  # the form is narrow
    lines.append("| variant | verdict | " + " | ".join(SHORT[name] for name in names) + " |")
    lines.append("| --- " * (2 + len(names)) + "|")
    for row in rows(result):
        damage = read(row.metrics).get("kl_mean")
        judged = row.metrics | ({"kl_mean": pessimistic(damage)} if damage else {})
        cells = [verdict(row), *(figure(name, judged.get(name)) for name in names)]
        lines.append(f"| {marked(row, result)} | " + " | ".join(map(plain, cells)) + " |")
    lines += ["", meaning(result)] if meaning(result) else []
    lines += ["", f"Report: {report}", "", "What would be published, with the digest of its card:", ""]
    for label, target in shown.targets.items():
        digest = hashlib.sha256(shown.documents[label]["README.md"]).hexdigest()
        lines.append(f"- {plain(label)} to {plain(target)}: {cards[label]}, sha256 {digest[:12]}…")
    lines += [
        "",
        "Nothing is measured or written again after your answer: what is published is what is shown here, sha256 "
        f"{shown.digest[:12]}…. Choose the variants to publish. If you choose none, nothing is published. {until}",
    ]
    return "\n".join(lines)
