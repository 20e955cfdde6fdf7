"""From a recipe to YAML that `tame run` takes."""

from typing import Any

import yaml

from configs.schema import Recipe


def as_yaml(recipe: Recipe) -> str:
    """The recipe, without what is as it would be anyway."""
    return yaml_of({"name": recipe.name, **recipe.model_dump(mode="json", exclude_defaults=True)})


def yaml_of(content: Any) -> str:
    """`content` as YAML, in its own order, and what is short on one line."""
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None))
