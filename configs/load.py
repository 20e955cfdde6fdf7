"""From a recipe file and `--set` options to a Recipe, or to one line that says what is wrong and where."""

import datetime
import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import BadInputError, line
from configs.schema import Recipe

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags, no anchors, no key twice, and 5e-2 is a number (as in YAML 1.2)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not taken; write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, settings: list[str] | None = None) -> Recipe:
    """Read, override by `KEY=VALUE` settings, and validate a recipe.

    Raises:
        BadInputError: the file cannot be read, is not plain YAML, or asks for something that does not exist. The
            message has the file, the key's path, the value, and what was expected.
    """
    recipe = _read(Path(path))
    for setting in settings or []:
        _apply(recipe, setting)
    try:
        return Recipe.model_validate(recipe)
    except ValidationError as error:
        raise BadInputError(f"{path}: {explain(error, Recipe)}") from None


def settled(recipe: dict[str, Any], settings: list[str]) -> Recipe:
    """A recipe that was made from arguments, overridden by `KEY=VALUE` settings, and validated.

    Raises:
        BadInputError: as `load_recipe`.
    """
    for setting in settings:
        _apply(recipe, setting)
    try:
        return Recipe.model_validate(recipe)
    except ValidationError as error:
        raise BadInputError(explain(error, Recipe)) from None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All that Pydantic found, in one line: key path, what is wrong, the value, the nearest key."""
    return "; ".join(_explain_one(dict(item), model) for item in error.errors())


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}; give the path of a recipe (see configs/)") from None
    if len(raw) > MAX_BYTES:
        raise BadInputError(f"{path}: {len(raw)} bytes is too large for a recipe")
    content = _parse(raw, str(path))
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {_kind(content)}"
        raise BadInputError(
            f"{path}: the recipe is {kind}; expected keys such as name, source, variants (see configs/)"
        )
    return content


def _parse(raw: bytes | str, where: str) -> Any:
    try:
        return yaml.load(raw, Loader=_Loader)  # noqa: S506  (a SafeLoader with less)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        number = f" line {mark.line + 1}" if mark else ""
        raise BadInputError(f"{where}{number}: {error.problem or error.context}; a recipe is plain YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise BadInputError(f"{where}: {line(error)}; a recipe is plain UTF-8 YAML") from None
    except RecursionError:
        raise BadInputError(f"{where}: nested too deeply; a recipe is plain YAML") from None


def _apply(recipe: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise BadInputError(f"--set {setting}: expected KEY=VALUE, such as gate.max_mean_kl=0.2")
    # A template such as {model}-{variant} begins like a YAML mapping, and is none.
    value = text if re.match(r"\{(model|variant|name)\}", text) else _parse(text, f"--set {key}")
    *parents, last = key.strip().split(".")
    at: Any = recipe
    for done, (part, following) in enumerate(zip(parents, [*parents, last][1:], strict=True)):
        if isinstance(at, dict):
            # A section or list that is absent, or null, is made: setting something in it is asking for it.
            at[part] = at = at[part] if at.get(part) is not None else [] if following == "0" else {}
        else:
            at = at[_index(at, part, key, ".".join(parents[:done]))]
    if isinstance(at, dict):
        at[last] = value
    elif isinstance(at, list) and last == str(len(at)):
        at.append(value)
    else:
        at[_index(at, last, key, ".".join(parents))] = value


def _index(at: Any, part: str, key: str, parent: str) -> int:
    if isinstance(at, list) and part.isdecimal() and int(part) < len(at):
        return int(part)
    reason = f"a list of {len(at)}; give an index below that" if isinstance(at, list) else f"{at!r}, which has no keys"
    raise BadInputError(f"--set {key}: {parent} is {reason}")


def _explain_one(item: dict[str, Any], model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        keys = _keys(model, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(keys)}"
        return f"{where} is not a key of a recipe; {hint}"
    if item["type"] == "missing":
        return f"{where} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    hint = (
        "; write it in quotes"
        if item["type"] == "string_type" and isinstance(value, int | float | datetime.date)
        else ""
    )
    return f"{where} is {_short(value)}: {message[0].lower()}{message[1:]}{hint}"


def _keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that the schema knows at `path`."""
    at: Any = model.model_json_schema()
    definitions = at.get("$defs", {})

    def resolve(node: Any) -> Any:
        for option in node.get("anyOf", [node]):
            if "$ref" in option:
                return definitions[option["$ref"].rsplit("/", 1)[1]]
        return node

    for part in path:
        at = at.get("items", {}) if isinstance(part, int) else at.get("properties", {}).get(part, {})
        at = resolve(at)
    return list(at.get("properties", {}))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _kind(value: Any) -> str:
    return {"list": "list", "str": "text"}.get(type(value).__name__, type(value).__name__)
