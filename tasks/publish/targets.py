"""Where the variants of a recipe are published."""

from pathlib import Path

from configs.schema import Recipe


def targets(recipe: Recipe, model: str, out: Path) -> dict[str, str]:
    """Where each variant is published: Hub repo ids, or absolute folders (relative ones lie under `out`/published)."""
    if recipe.publish.to == "nowhere":
        return {}
    filled = {
        v.label: recipe.publish.repo.format(model=model, variant=v.label, name=recipe.name)
        for v in recipe.variants
        if v.checkpoint is None  # nobody publishes what is somebody else's
    }
    if recipe.publish.to == "folder":
        return {label: str(out.absolute() / "published" / Path(repo).expanduser()) for label, repo in filled.items()}
    return filled
