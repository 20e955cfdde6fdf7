"""What a model's authors say that it scores: in `.eval_results/*.yaml` of its repo or folder, and in its card's model-index.

Both are the Hub's formats (https://huggingface.co/docs/hub/eval-results). What cannot be read is left out: these numbers are
only there to notice a measurement that went wrong.
"""

import fnmatch
import logging
import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from configs.errors import TameError
from configs.schema import Source
from tasks.download import hub
from tasks.values import Found

log = logging.getLogger("tame.download")

CARD, FILES = "README.md", ".eval_results/*.yaml"


class PublishedScore(BaseModel):
    """A score that was published with a model."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    """Of the benchmark, by its id on the Hub or by its name."""
    config: str
    """Which part of the benchmark; empty where that is not said."""
    metric: str
    """Empty where it is not said."""
    value: float
    """A share, 0 to 1."""
    where: str
    """The file that says so."""


def published_scores(source: Source, found: Found) -> list[PublishedScore]:
    """All that are published with `source`; none with an adapter, which changes what its base scores, or with a .gguf."""
    if found.adapter is not None or found.kind == "gguf":
        return []
    scores: list[PublishedScore] = []
    for name, text in _texts(source, found).items():
        try:
            scores += _of_card(text, name) if name == CARD else _of_file(yaml.safe_load(text), name)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
            log.debug("%s of %s has no scores that can be read: %s", name, source.model, error)
    return scores


def _texts(source: Source, found: Found) -> dict[str, str]:
    try:
        if found.kind == "hub":
            commit = str(found.commit)
            known = hub.remembered(source.model, commit)
            names = [
                name for name in (known.files if known else []) if name == CARD or fnmatch.fnmatchcase(name, FILES)
            ]
            folder = hub.fetch_files(source.model, commit, names) if names else Path()
        else:
            folder = Path(str(found.path))
            names = [path.relative_to(folder).as_posix() for path in (folder / CARD, *folder.glob(FILES))]
        return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}
    except (TameError, OSError, ValueError) as error:
        log.debug("what %s scores is not known: %s", source.model, error)
        return {}


def _of_card(text: str, where: str) -> list[PublishedScore]:
    front = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    index = (yaml.safe_load(front[1]) or {}).get("model-index") if front else None
    return [
        score
        for model in index or []
        for result in model.get("results") or []
        for metric in result.get("metrics") or []
        if (score := _score(result.get("dataset") or {}, "type", "config", metric, where))
    ]


def _of_file(entries: Any, where: str) -> list[PublishedScore]:
    return [
        score for entry in entries or [] if (score := _score(entry.get("dataset") or {}, "id", "task_id", entry, where))
    ]


def _score(dataset: Any, name: str, part: str, metric: Any, where: str) -> PublishedScore | None:
    """A score in either format; None for what is no number, or no share of answers."""
    value = metric.get("value")
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 <= value <= 100
    ):
        return None
    return PublishedScore(
        dataset=str(dataset.get(name) or dataset.get("name") or ""),
        config=str(dataset.get(part) or ""),
        metric=str(metric.get("type") or ""),
        value=value / 100 if value > 1 else float(value),  # both are written
        where=where,
    )
