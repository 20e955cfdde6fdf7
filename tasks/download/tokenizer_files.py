"""What the files of a tokenizer say, read without transformers: the chat template, and whether there is a BOS token."""

from pathlib import Path
from typing import Literal

from configs.errors import BadInputError
from tasks.runtime.files import read_object

TEMPLATE, CONFIG, OLDER = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
THINKING = ("</think", "enable_thinking", "[THINK]", "<|channel|>", "END_THINKING", "seed:think")
"""What a template has in it if its model thinks before it answers."""


def chat_template(folder: Path, chat: Literal["auto", "always", "never"] = "auto") -> str | None:
    """The chat template of the model in `folder`, where `chat` wants it: the one that transformers takes unless told another.

    Raises:
        BadInputError: `chat` is always, and there is none.
    """
    found = None if chat == "never" else _template(folder)
    if found is None and chat == "always":
        raise BadInputError(f"evaluate.chat always: {folder} has no chat template; say auto, or add {TEMPLATE}")
    return found


def check_bos(folder: Path, bos: str) -> None:
    """See that windows can begin with BOS, where `bos` is always.

    Raises:
        BadInputError: the tokenizer has no such token.
    """
    config = read_object(folder / CONFIG)
    if (
        bos == "always"
        and config
        and not any(read_object(folder / name).get("bos_token") for name in (CONFIG, "special_tokens_map.json"))
    ):
        raise BadInputError("evaluate.bos always: the model's tokenizer has no BOS token; say auto")


def thinks(template: str | None) -> bool:
    """Whether a chat template is that of a model that thinks before it answers."""
    return template is not None and any(sign in template for sign in THINKING)


def _template(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    for name in (CONFIG, OLDER):
        found = read_object(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
