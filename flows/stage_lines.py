"""What a run in a terminal says of each stage when it is done: a line that stays, above the bar of tasks/runtime/progress.py."""

import time
from collections.abc import Callable

from configs.errors import named_line
from configs.schema import Recipe
from flows.direct import Stages
from tasks.fitted import Fitted
from tasks.formatting import NOT_MEASURED, figure
from tasks.result import ResultVariant
from tasks.runtime import progress
from tasks.values import Evaluation, Served, Snapshot


class StageLines:
    """Says what each stage came to: `✓ 3/6 nf4 quantized 1.2 s · measured 66 s · KL 0.1030 · passed`."""

    def __init__(self, recipe: Recipe, by: Stages, say: Callable[[str], None]) -> None:
        self.by, self.say, self.how, self.fit = by, say, list[str](), list[str]()
        self.done, self.stages, self.published = 0, 1 + (recipe.evaluate is not None) + len(recipe.variants), 0
        self.begin("looking at the model")

    def begin(self, what: str) -> None:
        """A stage begins."""
        self.what, self.started, self.how, self.fit = what, time.monotonic(), [], []
        progress.begin(f"{self.done + 1}/{self.stages + self.published} {what}")

    def downloaded(self, snapshot: Snapshot) -> None:
        """The source is here."""
        self._say("✓", snapshot.name, ["here already" if snapshot.cached else f"downloaded {self._seconds()}"])
        self.begin("baseline")

    def baseline(self, baseline: Evaluation) -> None:
        """The original was measured."""
        how = "measured before" if baseline.cached else f"measured {self._seconds()}"
        perplexity = baseline.metrics.get("perplexity")
        perplexities = [] if perplexity is None else [f"perplexity {figure('perplexity', perplexity)}"]
        self._say("✓", "baseline", [how, *perplexities])

    def fitted(self, fitted: Fitted) -> None:
        """The mix that keeps a variant's limit is known; it is written now."""
        kept = fitted.kept if fitted.modules or fitted.finer else "all is quantized"
        how = "fitted before" if fitted.cached else f"fitted {self._seconds()}"
        self.fit = [f"{how} to {fitted.limit}: {kept}"]
        self.started = time.monotonic()

    def quantized(self) -> None:
        """A variant was quantized; it is measured now."""
        self.how.append(self._seconds())
        self.started = time.monotonic()

    def measured(self, variant: ResultVariant) -> None:
        """A variant was quantized and measured, or has failed."""
        if variant.status == "failed":
            self._say("✗", variant.name, [f"failed after {self._seconds()}", str(variant.error)])
            return
        quantized = "before" if "quantize" in variant.cached else self.how[0]
        if not variant.measured:
            self._say("✓", variant.name, [f"quantized {quantized}", NOT_MEASURED])
            return
        measured = "before" if "evaluate" in variant.cached else self._seconds()
        how = [*self.fit, f"quantized {quantized}", f"measured {measured}"]
        damage = variant.metrics.get("kl_mean")
        divergence = [] if damage is None else [f"KL {figure('kl_mean', damage)}"]
        reasons = variant.gate.reasons if variant.gate else []
        mark = "✗" if variant.status == "rejected" else "✓"
        opened = [f"{_how(each)} {each.title} {each.version}" for each in variant.served]
        self._say(mark, variant.name, [*how, *divergence, *opened, *reasons, variant.status])

    def publishing(self, variant: ResultVariant) -> None:
        """A variant is where it was to go, or it has failed."""
        if variant.status == "failed":
            self._say("✗", variant.name, ["not published", str(variant.error)])
        else:
            self._say("✓", variant.name, [f"published {self._seconds()}", str(variant.published)])

    def failed(self, error: Exception) -> None:
        """A stage that all others need has failed."""
        self._say("✗", self.what, [f"failed after {self._seconds()}", named_line(error, limit=None)])

    def _seconds(self) -> str:
        return f"{time.monotonic() - self.started:.1f} s"

    def _say(self, mark: str, what: str, how: list[str]) -> None:
        self.done += 1
        progress.begin("")
        self.say(f"{mark} {self.done}/{self.stages + self.published} {what} {' · '.join(how)}")


def _how(served: Served) -> str:
    """What became of a checkpoint in a program whose name follows."""
    if served.agrees:
        return "opened by"
    return "opened, but not proven, by" if served.opened else "not opened by"
