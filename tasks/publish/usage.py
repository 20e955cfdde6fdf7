"""What the card says on using a model: a snippet that runs as it stands, what to install, and how much memory it takes."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tasks.download.architectures import ENCODER_DECODER, called_by, no_language_model
from tasks.formatting import figure
from tasks.quantize.protocols import CardText
from tasks.runtime.files import read_object
from tasks.values import Served, Unquantized

CONTEXTS = (2048, 8192)
"""Lengths of the context, in tokens, that the memory is told for."""
CACHE_BYTES = 2  # of a number in the cache of keys and values, which is kept in 16 bits
PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def usage(repo: str, method: CardText | None, folder: Path | None = None, size: int | None = None) -> list[str]:
    """The paragraphs of the section.

    Args:
        repo: Where the model is published.
        method: What the card says of its format; None where it is not quantized.
        folder: Its files, which tell whether it has a chat template, and how large its cache grows; None if they are unknown.
        size: Of its files, in bytes; None if it is unknown.
    """
    packages = ("transformers", "accelerate", *(method.install if method else ()))
    config = read_object(folder / "config.json") if folder else {}
    other = None if folder is None else no_language_model(config, [path.name for path in folder.glob("*.json")])
    text = _snippet(repo, folder is not None and has_chat_template(folder))
    lines = ["## Use", text if other is None else _forward(repo, called_by(config), other == ENCODER_DECODER)]
    lines.append(f"Needs `pip install {' '.join(packages)}`.")
    if other is None and folder and size and (needed := memory(folder, size)):
        sizes = ", ".join(f"{figure('size_bytes', value)} with {tokens:,} tokens" for tokens, value in needed.items())
        lines.append(
            f"On a GPU it takes about {sizes} of context: weights, and keys and values in 16 bits, for one sequence. Activations, "
            "and what CUDA itself needs, come on top."
        )
    return lines


def serving(repo: str, method: CardText, served: Sequence[Served], left: Sequence[Unquantized] = ()) -> list[str]:
    """The paragraphs on other programs: those that were tried say how that went, and the format's homes that they are no more.

    A program that could not open the files is not recommended, nor one that is known not to: for what is `left` unquantized.
    """
    tried = {each.runtime: each for each in served}
    experts = any(".experts." in entry.module for entry in left)
    lines = []
    for home in method.homes:
        command = f"`{home.command.format(repo=shlex.quote(repo))}`"
        if (found := tried.pop(home.runtime, None)) is None and experts and not home.plain_experts:
            lines.append(
                f"- {home.title}: not this model: it opens no mixture in this format whose experts stay in 16 bits."
            )
        elif found is None:
            lines.append(
                f"- {home.title}: {command}. The format is made for it; tame has not tried it with these files."
            )
        elif found.agrees:
            lines.append(f"- {home.title}: {command}. **Tried**: {found.sentence}.")
        else:
            lines.append(f"- {home.title}: **not with these files.** {found.sentence}.")
    lines += [f"- {found.sentence}." for found in tried.values()]
    return ["## Serve and train", "\n".join(lines)] if lines else []


def has_chat_template(folder: Path) -> bool:
    """Whether a model's tokenizer brings a template for chats, in a file of its own or in tokenizer_config.json."""
    return (folder / "chat_template.jinja").is_file() or bool(
        read_object(folder / "tokenizer_config.json").get("chat_template")
    )


def memory(folder: Path, size: int) -> dict[int, int]:
    """Bytes for each length of CONTEXTS that the model takes: its weights, and two numbers (a key and a value) per layer, head and
    dimension for each token. Empty for models that cache something else, such as states or compressed keys.
    """
    config = read_object(folder / "config.json")
    config = config.get("text_config") or config
    layers, heads, width = (config.get(key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kinds = set(config.get("layer_types") or PLAIN_LAYERS)
    numbers = all(isinstance(value, int) and value > 0 for value in (layers, heads, width))
    if not numbers or not kinds <= PLAIN_LAYERS or config.get("kv_lora_rank"):
        return {}
    cached = config.get("num_key_value_heads") or heads
    dimension = config.get("head_dim") or width // heads  # type: ignore[operator]
    longest = config.get("max_position_embeddings") or max(CONTEXTS)
    a_token = 2 * layers * cached * dimension * CACHE_BYTES  # type: ignore[operator]
    return {tokens: size + tokens * a_token for tokens in CONTEXTS if tokens <= longest}


def _snippet(repo: str, chat: bool) -> str:
    asked = (
        'messages = [{"role": "user", "content": "What is the capital of France?"}]\n'
        'print(generate(messages, max_new_tokens=128)[0]["generated_text"][-1]["content"])\n'
        if chat
        else 'print(generate("The capital of France is", max_new_tokens=32)[0]["generated_text"])\n'
    )
    return (
        "```python\n"
        "from transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", {_literal(repo)}, device_map="auto")\n'
        f"{asked}```"
    )


def _literal(repo: str) -> str:
    """A repo or a path as Python's source has it, whatever is in it."""
    return json.dumps(repo, ensure_ascii=False)


def _forward(repo: str, name: str, generates: bool) -> str:
    """For a model that does not continue a text: one that answers it, or gives numbers for it."""
    shown = (
        "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)))"
        if generates
        else "print(model(**inputs)[0])"
    )
    return (
        "```python\n"
        f"from transformers import AutoTokenizer, {name}\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(repo)})\n"
        f'model = {name}.from_pretrained({_literal(repo)}, device_map="auto")\n'
        'inputs = tokenizer("Paris is the capital of France.", return_tensors="pt").to(model.device)\n'
        f"{shown}\n```"
    )
