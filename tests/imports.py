"""The rules of the house that no linter knows: `python -m tests.imports` prints what breaks one, a line each, and ends with 1.

1. No circle of imports between files; an import inside a function, or under TYPE_CHECKING, counts like one at the top.
2. Imports point one way. ROOMS lists the rooms of the house from the ground up; a file imports from its own room and from those
   below it.
3. Only `tasks/quantize/methods/` names the library of a format.
4. No file over 350 lines, no function over 60, no more than 7 parameters. A comment on the lines of the `def` that gives the
   reason lifts the last two; the recipe's schema may be longer than 350.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOMS = (
    "configs",
    "tasks.runtime",
    "tasks.store",
    "tasks.metrics",
    "tasks.values",
    "tasks.fitted",
    "tasks.download",
    "tasks.transformers_adapter",
    "tasks.calibrate",
    "tasks.quantize",
    "tasks.result",
    "tasks.decision",
    "tasks.formatting",
    "tasks.sentences",
    "tasks.evaluate",
    "tasks.fit",
    "tasks.serve",
    "tasks.gate",
    "tasks.publish",
    "tasks.track",
    "tasks.report",
    "tasks.fleet",
    "tasks.plan",
    "tasks.describe",
    "tasks.suggest",
    "flows",
    "infra",
    "tame",
)
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 350, 60, 7
LONGER = {"configs.schema"}
LIBRARY = re.compile(r"bitsandbytes|bnb|compressed.tensors", re.IGNORECASE)
METHODS = "tasks.quantize.methods"


def problems(root: Path) -> list[str]:
    """What breaks a rule in the house at `root`, a line each."""
    files = {_module(path, root): path for path in _files(root)}
    sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    imports = {name: set(_imported(ast.parse(source), name, set(files))) for name, source in sources.items()}
    found = [f"circle: {' → '.join([*circle, circle[0]])}" for circle in _circles(imports)]
    found += [problem for name in imports for problem in _wrong_way(name, imports[name])]
    found += [problem for name, source in sources.items() for problem in _names_a_library(name, source)]
    found += [problem for name, source in sources.items() for problem in _too_large(name, source)]
    return sorted(found)


def _files(root: Path) -> Iterator[Path]:
    yield from root.glob("tame.py")
    for folder in ("configs", "flows", "infra", "tasks"):
        yield from (root / folder).rglob("*.py")


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.AST, name: str, known: set[str]) -> Iterator[str]:
    """The files of the house that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if f"{module}.{alias.name}" in known:
                    yield f"{module}.{alias.name}"
                elif module in known:
                    yield module


def _circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The shortest circle through each file that is in one, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(imports):
        before: dict[str, str | None] = {start: None}
        waiting = [start]
        for at in waiting:  # grows while it is walked: the nearest files first
            for other in sorted(imports[at]):
                if other == start:
                    circle, step = [], at
                    while step is not None:
                        circle.append(step)
                        step = before[step]
                    found.setdefault(frozenset(circle), circle[::-1])
                    waiting.clear()
                    break
                if other not in before:
                    before[other] = at
                    waiting.append(other)
    return list(found.values())


def _room(name: str) -> str | None:
    return next((room for room in ROOMS if name == room or name.startswith(f"{room}.")), None)


def _wrong_way(name: str, imported: set[str]) -> Iterator[str]:
    if name == "tasks":
        return
    room = _room(name)
    if room is None:
        yield f"room: {name} is in no room of tests/imports.py"
        return
    for other in sorted(imported):
        above = _room(other)
        if above and ROOMS.index(above) > ROOMS.index(room):
            yield f"arrow: {name} imports {other}, and {above} stands above {room}"


def _names_a_library(name: str, source: str) -> Iterator[str]:
    if name == METHODS or name.startswith(f"{METHODS}."):
        return
    for number, text in enumerate(source.splitlines(), 1):
        if LIBRARY.search(text):
            yield f"library: {name} line {number} names {LIBRARY.search(text)[0]}"  # type: ignore[index]


def _too_large(name: str, source: str) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > LONGEST_FILE and name not in LONGER:
        yield f"file: {name} has {lines} lines, {LONGEST_FILE} are the most"
    reasons = _comments(source)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(number in reasons for number in range(node.lineno, node.body[0].lineno)):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > LONGEST_FUNCTION:
            yield f"function: {name}.{node.name} has {length} lines, {LONGEST_FUNCTION} are the most"
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        count = len(given) - (bool(given) and given[0].arg in ("self", "cls"))
        if count > MOST_PARAMETERS:
            yield f"parameters: {name}.{node.name} has {count}, {MOST_PARAMETERS} are the most"


def _comments(source: str) -> set[int]:
    """The lines with a comment for people; one for a tool (noqa, type, fmt) gives no reason."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]
        for token in tokens
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:|fmt:)", token.string)
    }


if __name__ == "__main__":
    every = problems(Path(__file__).parent.parent)
    print("\n".join(every))
    sys.exit(bool(every))
