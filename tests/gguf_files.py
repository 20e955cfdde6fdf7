"""Tiny .gguf files, made from tiny models as llama.cpp's converter makes them."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size", "head_dim": "attention.key_length",
}  # fmt: skip


def write(
    path: Path,
    model: Path,
    *,
    architecture: str = "llama",
    tensors: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    metadata: dict[str, Any] | None = None,
    per_part: int = 0,
) -> Path:
    """Write the checkpoint `model` to `path`: changed `tensors` and `metadata`, None to leave one out; `without` some tensors.

    With `per_part`, in parts of so many tensors; `path` is then the first of them.
    """
    found = {name: value for name, value in converted(model, architecture).items() if name not in without}
    found |= tensors or {}
    options = {"split_max_tensors": per_part} if per_part else {}
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in (settings(model, architecture) | (metadata or {})).items():
        if value is not None:
            entry(writer, key, value)
    for name, tensor in found.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not per_part else next(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))


def entry(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value by its Python type."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def settings(model: Path, architecture: str) -> dict[str, Any]:
    """The metadata of the checkpoint `model`: its configuration and tokenizer."""
    config = json.loads((model / "config.json").read_bytes())
    vocabulary = json.loads((model / "tokenizer.json").read_bytes())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in vocabulary["merges"]]
    found = {f"{architecture}.{ours}": config[theirs] for theirs, ours in NAMES.items() if theirs in config}
    theta = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return found | {
        f"{architecture}.rope.freq_base": float(theta), f"{architecture}.rope.dimension_count": head,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.padding_token_id": 0,
    }  # fmt: skip


def converted(model: Path, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint `model` under llama.cpp's names, in float32, Llama's q and k permuted as there."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_bytes())
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        value = tensor.to(torch.float32).numpy()
        kind = next((kind for kind in ("q", "k") if f"self_attn.{kind}_proj" in name), None)
        if architecture == "llama" and kind:
            heads = config["num_attention_heads" if kind == "q" else "num_key_value_heads"]
            halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = halves.swapaxes(1, 2).reshape(value.shape)
        found[str(names.get_name(name, try_suffixes=(".weight", ".bias")))] = np.ascontiguousarray(value)
    return found
