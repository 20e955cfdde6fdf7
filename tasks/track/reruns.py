"""A release that was run again and made nothing: how it is told from one that adds to MLflow's history."""

import hashlib
import json
from typing import Any

from tasks.result import Result

CONTENT = "tame.release_content"
"""The tag of a release's run by which another run finds that it has nothing to add."""


def shown_already(client: Any, experiment_id: str, run_id: str, result: Result) -> str | None:
    """The run of an earlier release that shows the same, where `result` made nothing: all of it came from the cache."""
    measured = [result.baseline, *result.variants]
    if not all(row and row.all_cached for row in measured):
        return None
    if any(variant.status == "failed" for variant in result.variants):
        return None
    same = f"tags.kind = 'release' and tags.`{CONTENT}` = '{content_of(result)}'"
    found = [run.info.run_id for run in client.search_runs([experiment_id], same) if run.info.run_id != run_id]
    return str(found[-1]) if found else None


def content_of(result: Result) -> str:
    """A digest of what was asked, what it was asked of, and what came of it."""
    variants = [
        [v.name, v.status, v.published, v.metrics, v.artifact.digest if v.artifact else None] for v in result.variants
    ]
    baseline = result.baseline.metrics if result.baseline else None
    content = [result.recipe.model_dump(mode="json"), result.source.digest, baseline, variants]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
