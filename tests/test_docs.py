"""Every command and every recipe in the README and the docs is one that tame takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import tame
from configs.schema import Recipe, Sweep, Watch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.name}-{number}", block)
        for page in PAGES
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S))
    ]


COMMANDS = [
    (name, line.strip())
    for name, block in blocks("(?:sh|bash)")
    for line in block.replace("\\\n", " ").splitlines()
    if re.match(r"\s*(\w+=\S+ )*tame ", line)
]


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[f"{n}: {c[:40]}" for n, c in COMMANDS])
def test_commands_parse(name: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words.pop(0)
    options = tame._parser().parse_args(words[1:])
    if recipe := getattr(options, "recipe", None):
        assert not recipe.startswith("configs/") or (ROOT / recipe).exists()


@pytest.mark.parametrize(("name", "block"), [b for b in blocks("yaml") if "source" in b[1]])
def test_recipes_are_valid(name: str, block: str) -> None:
    Recipe.model_validate(yaml.safe_load(block))


@pytest.mark.parametrize(("name", "block"), [b for b in blocks("yaml") if b[1].startswith(("# watch/", "# sweep/"))])
def test_parameters_of_watch_and_sweep_are_valid(name: str, block: str) -> None:
    kind = Watch if block.startswith("# watch") else Sweep
    kind.model_validate(yaml.safe_load(block)["spec"])


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"^make (\w+)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists() or link.startswith("docs/"), f"{page.name}: {link}"


def test_the_tree_in_the_readme_is_what_is_there() -> None:
    tree = (ROOT / "README.md").read_text().split("## The house")[1]
    there = [path for top in ROOT.iterdir() if not top.name.startswith(".") for path in (top, *top.rglob("*"))]
    for name in re.findall(r"^(?:  )?([\w./]+\.py|\w+/)", tree, re.M):
        assert any(path.match(name.rstrip("/")) for path in there), name
