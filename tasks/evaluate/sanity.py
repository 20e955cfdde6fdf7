"""Is a baseline's score what its authors published? One that is far below says that the measurement is wrong. Pure."""

import re
from collections.abc import Iterable

from tasks.download.published_scores import PublishedScore
from tasks.metrics import is_score, parse, read

FAR = 0.1
"""How far below, as a difference of shares: other prompts and numbers of examples move a score by less, mostly."""
PUBLISHED = "that was published with it"
WHOLE = {"", "default", "main", "all"}


def far_below(metrics: dict[str, float], published: Iterable[PublishedScore]) -> list[str]:
    """A sentence for each task of which even the upper end of the interval is more than `FAR` below a published score.

    A score is compared with the published one of the same metric; where the metric is not named alike, with the best of the
    task's, so that a flag is raised for no want of a name.
    """
    numbers = {name: metric for name, metric in read(metrics).items() if is_score(name)}
    flagged: dict[str, str] = {}
    for score in published:
        for task in dict.fromkeys(str(parse(name).task) for name in numbers):
            if not _is_of(score, task):
                continue
            ours = {name: metric for name, metric in numbers.items() if parse(name).task == task}
            same = [name for name in ours if _plain(parse(name).quantity) == _plain(score.metric)]
            name = same[0] if same else max(ours, key=lambda one: ours[one].value)
            metric = ours[name]
            top = metric.value if metric.high is None else metric.high
            if top < score.value - FAR:
                flagged[f"{task} {score.where}"] = (
                    f"task {task}: {parse(name).quantity} is {_percent(metric.value)}, and at most {_percent(top)}, far below the "
                    f"{_percent(score.value)} {PUBLISHED} ({score.where}): look for what differs in the measurement"
                )
    return list(flagged.values())


def _is_of(score: PublishedScore, task: str) -> bool:
    """Whether a published score is of lm-evaluation-harness's `task`, as far as names tell."""
    own, config, dataset = _plain(task), _plain(score.config), _plain(score.dataset.rsplit("/", 1)[-1])
    if not dataset:
        return False
    if own == config or (config.startswith(dataset) and config != dataset and own.startswith(config)):
        return True  # a part of a benchmark that is a task of its own: ARC-Challenge of ai2_arc, gpqa_diamond of gpqa
    return own == dataset and (config in WHOLE or config.startswith(dataset))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
