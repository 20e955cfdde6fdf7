"""Registers a deployment of the release flow for each shipped recipe, and runs what is asked of them: `python -m infra.serve`."""

import logging
from typing import Any


def main() -> None:
    """Serve until ended."""
    from prefect import serve

    from configs.load import load_recipe
    from flows.release import release
    from infra.up import CONFIGS

    logging.getLogger("tame").setLevel(logging.INFO)
    deployments: list[Any] = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        recipe = load_recipe(path)
        parameters = {"recipe": recipe.model_dump(mode="json")}
        deployments.append(release.to_deployment(recipe.name, parameters=parameters, description=release.description))
    serve(*deployments, limit=1)


if __name__ == "__main__":
    main()
