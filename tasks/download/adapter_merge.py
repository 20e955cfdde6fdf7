"""A LoRA adapter merged into its base, tensor by tensor: the bytes that PEFT's `merge_and_unload` gives on a CPU.

PEFT holds adapters in float32, whatever they were saved in, and adds to a weight in float32, rounding once. An embedding is the
exception: what is added to it is rounded to its dtype first. The whole is a copy of the base's files in which the tensors that the
adapter changes are overwritten where they stand, so that memory is that of one tensor.
"""

import json
import math
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.errors import BadInputError
from tasks.download.checkpoint import Stored, read_tensors, weight_files
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?$")
REFUSED = (
    "use_qalora", "alora_invocation_tokens", "target_parameters", "layer_replication", "trainable_token_indices",
    "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "megatron_config", "lora_bias",
)  # fmt: skip
"""What an adapter_config.json may ask for that changes the weights in another way than LoRA, rsLoRA and DoRA do."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")
"""Ways to initialize an adapter that leave the base's weights as they are: others, such as PiSSA, take a part of them away."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges*")


EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings?)")
HEAD = re.compile(r"(.*\.)?(\w*head|embed_out|output)\.weight")
"""The modules that make hidden states of tokens, and the tensor that makes logits of them, as architectures call them."""


class Change(NamedTuple):
    """What an adapter does to a tensor of the base: `parts`, by kind, are names of its tensors; `replace` comes before what is
    added, as PEFT saves the embedding that an adapter changes."""

    tensor: Stored
    module: str
    parts: dict[str, str]


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse an adapter that tame cannot merge, by the name of what it asks for.

    Raises:
        BadInputError: it is no LoRA, or of a kind that changes weights in another way.
    """
    if config.get("peft_type") != "LORA":
        raise BadInputError(
            f"{where}: its peft_type is {config.get('peft_type')!r}, and tame merges LORA alone; merge it (PEFT's "
            "merge_and_unload), and give the merged model"
        )
    asked = [name for name in REFUSED if config.get(name)]
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        asked.append(f"init_lora_weights: {start}")
    if config.get("bias", "none") != "none":
        asked.append(f"bias: {config['bias']}")
    if asked:
        raise BadInputError(
            f"{where}: {CONFIG} has {asked[0]}, which tame cannot merge; merge it (PEFT's merge_and_unload), and give the merged "
            "model"
        )


def merge(base: Path, adapter: Path, folder: Path, carried: list[str], progress: Progress = silent) -> None:
    """Write into `folder` the base with the adapter merged.

    Args:
        base: Folder of the base model.
        adapter: Folder of the adapter.
        folder: Gets the merged model: the base's files under the same names.
        carried: The base's files to take besides its weights. The adapter's own tokenizer goes before the base's.
        progress: Told tensors.

    Raises:
        BadInputError: an adapter that does not fit the base, or is of a kind that cannot be merged.
    """
    import torch
    from safetensors import safe_open

    config = json.loads((adapter / CONFIG).read_bytes())
    check_config(config, str(adapter))
    with safe_open(adapter / WEIGHTS, framework="pt") as ours:
        names = list(ours.keys())
    changes = changes_of(names, read_tensors(base), adapter)
    for name in [*carried, *weight_files(base)]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)
    for pattern in TOKENIZER:
        for path in adapter.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    torch.set_grad_enabled(False)
    with ExitStack() as stack:
        files = {change.tensor.file for change in changes}
        written = {file: stack.enter_context((folder / file).open("r+b")) for file in files}
        for done, change in enumerate(changes):
            weight = _tensor(base / change.tensor.file, change.tensor.name)
            parts = {kind: _tensor(adapter / WEIGHTS, name) for kind, name in change.parts.items()}
            merged = _merged(weight, parts, change, config, str(adapter))
            file = written[change.tensor.file]
            file.seek(change.tensor.start)
            file.write(merged.to(weight.dtype).contiguous().view(torch.uint8).numpy().data)
            progress(f"merge {adapter.name}", done + 1, len(changes))


def changes_of(names: list[str], tensors: dict[str, Stored], where: Path) -> list[Change]:
    """Which tensors of the base an adapter with tensors of these `names` changes, in the base's order.

    Raises:
        BadInputError: a name that is not one of LoRA's, or that has no tensor in the base; or an embedding that is the base's
            output head, too, which PEFT leaves as it is.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        bare = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        if match := PART.fullmatch(bare):
            found.setdefault((match[1], f"{match[1]}.weight"), {})[match[2]] = name
        elif ".lora_" in bare:
            raise BadInputError(f"{where}: tame cannot merge its {name}; merge it (PEFT's merge_and_unload)")
        else:  # modules_to_save: a module as a whole
            bare = bare.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            found.setdefault((bare.rpartition(".")[0], bare), {})["replace"] = name
    changes = []
    for (module, wanted), parts in found.items():
        stored = tensors.get(wanted) or tensors.get(
            wanted.partition(".")[2]
        )  # a checkpoint of the model without its head
        if stored is None:
            raise BadInputError(
                f"{where}: it changes {wanted}, and the base has no tensor of that name; merge it (PEFT's merge_and_unload), "
                "and give the merged model"
            )
        if EMBEDDING.fullmatch(module) and not any(HEAD.fullmatch(name) for name in tensors):
            raise BadInputError(
                f"{where}: it changes {module}, which is the output head of the base, too, and PEFT changes the embedding alone; "
                "merge it (PEFT's merge_and_unload, of the base with tie_word_embeddings: false), and give the merged model"
            )
        changes.append(Change(stored, module, parts))
    return sorted(changes, key=lambda change: (change.tensor.file, change.tensor.start))


def _tensor(path: Path, name: str) -> "torch.Tensor":
    """A tensor of a safetensors file, open for it alone: what is mapped of a file that stays open counts as memory."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def _merged(
    weight: "torch.Tensor", parts: "dict[str, torch.Tensor]", change: Change, config: dict[str, Any], where: str
) -> "torch.Tensor":
    """A weight with what the adapter adds to it, or puts in its place."""
    import torch

    if (whole := parts.get("replace")) is not None:
        weight = _fitting(whole, weight, change, where).to(weight.dtype)
        if len(parts) == 1:
            return weight
    embedding = "lora_embedding_A" in parts
    first, second = (parts[f"lora_embedding_{side}" if embedding else f"lora_{side}"].float() for side in ("A", "B"))
    turned = embedding or bool(config.get("fan_in_fan_out"))
    product = second @ first
    delta = (product.T if turned else product) * _scaling(change.module, first.shape[0], config)
    delta = _fitting(delta, weight, change, where)
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is None:
        return weight.float() + (delta.to(weight.dtype).float() if embedding else delta)
    rows = (weight + delta).T if turned else weight + delta
    factor = magnitude.float().view(-1) / torch.linalg.norm(rows, dim=1)
    factor = factor.view(1, -1) if turned else factor.view(-1, 1)
    scaled: torch.Tensor = factor * (weight + delta)
    return scaled


def _fitting(change: "torch.Tensor", weight: "torch.Tensor", of: Change, where: str) -> "torch.Tensor":
    if change.shape != weight.shape:
        raise BadInputError(
            f"{where}: it has {of.tensor.name} as {list(change.shape)}, the base as {list(weight.shape)}; give the base that it "
            "was trained on"
        )
    return change


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    """What the product of an adapter's two matrices is multiplied with: alpha / r, or, for rsLoRA, alpha / √r."""
    patterns = config.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(own, config.get("lora_alpha", 8))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
