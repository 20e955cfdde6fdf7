"""What a look at a source tells of its model, from config.json and the sizes of its files, without transformers: about how large
it is, whether most of it are experts, and whether it was made to chat."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from tasks.runtime.files import read_object
from tasks.values import Found


class Facts(NamedTuple):
    """Numbers of parameters, each an estimate within a few per cent, and what the model is for."""

    parameters: int
    linear: int
    """In linear layers that are no experts: what every method quantizes."""
    experts: int
    """In experts, which only some methods quantize."""
    chat: bool
    """Whether it was made to answer people."""
    known: bool = True
    """Whether more than the sizes of its files is known."""

    @property
    def is_mixture(self) -> bool:
        """Whether most of the model are experts."""
        return self.experts > self.parameters / 2

    @property
    def summary(self) -> str:
        """In a few words: `1.7 billion parameters, dense, made to chat`."""
        count = self.parameters
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.0f} million"
        if not self.known:
            return f"about {size} parameters"
        kind = f"{self.experts / count:.0%} in experts" if self.experts else "dense"
        return f"about {size} parameters, {kind}" + (", made to chat" if self.chat else "")


def facts_of(found: Found, tokenizer: Path | None = None) -> Facts:
    """What is known of the model of `found`; `tokenizer` is a folder with its small files, if there is one."""
    if found.counted is not None:
        return Facts(*found.counted, _chat(found, tokenizer))
    config: dict[str, Any] = found.config.get("text_config") or found.config
    weights = sum(size for name, size in found.files.items() if name.endswith(".safetensors"))
    item = 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2
    parameters = int(weights / item) or 1
    width = _number(config, "hidden_size", "n_embd", "d_model")
    words = width * _number(config, "vocab_size")
    if not width:
        return Facts(parameters, int(0.8 * parameters), 0, _chat(found, tokenizer), known=False)
    embeddings = words * (1 if config.get("tie_word_embeddings") else 2)
    experts = (
        3
        * width
        * _number(config, "moe_intermediate_size", "intermediate_size")
        * _number(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        * _number(config, "num_hidden_layers", "n_layer")
    )
    if (found.config.get("quantization_config") or {}).get(
        "quant_method"
    ) == "mxfp4":  # 17 bytes for 32 weights of experts
        parameters = int((weights - experts * 17 / 32) / item) + experts
    experts = min(experts, parameters)
    return Facts(
        parameters, max(parameters - experts - min(embeddings, parameters), 0), experts, _chat(found, tokenizer)
    )


def _chat(found: Found, tokenizer: Path | None) -> bool:
    if "chat_template.jinja" in found.files or re.search(r"(?i)(^|[-_.])(instruct|chat|it)([-_.]|$)", found.name):
        return True
    return tokenizer is not None and "chat_template" in read_object(tokenizer / "tokenizer_config.json")


def _number(config: dict[str, Any], *names: str) -> int:
    """The first of `names` that is a number: architectures call the same thing differently."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)
