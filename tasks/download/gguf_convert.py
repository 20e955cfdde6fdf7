"""A .gguf as a normal checkpoint, through transformers. Runs in a process of its own; see tasks/download/task.py.

transformers fills what such a file lacks with random numbers, leaves out what it has no place for, and takes its own default
for a setting that it does not read, all without an error. So the result is compared with the file's header here, and what
cannot be kept is refused. Everything that tame knows of transformers' loader of these files is in this file.
"""

import logging
import math
from pathlib import Path
from typing import Any

from configs.errors import BadInputError, TameError, line
from tasks.download.gguf import GgufHeader, GgufTensor, check_gguf
from tasks.download.gguf_parts import as_one, join, model_name, read_parts
from tasks.runtime.progress import Progress

log = logging.getLogger("tame.download")

# What llama.cpp calls a setting, and what configurations of transformers call it. Where they have none of these names, and
# the value is not one that changes nothing, the model would compute something else.
SETTINGS: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": (
        "rms_norm_eps", "layer_norm_epsilon", "norm_eps", "layer_norm_eps", "norm_epsilon",
    ),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.scale": (),
    "attention.max_alibi_bias": (),
    "attention.clamp_kqv": (),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor",),
}  # fmt: skip
NEUTRAL = {"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0, "expert_weights_scale": 1.0}
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LLAMA3_CONTEXTS = [1 << power for power in range(11, 18)]  # what Llama 3.1's scaling may have been computed from
TOLERANCE = 1e-3  # of what is stored in 32 bits and computed anew


def dequantize(gguf: Path, folder: Path, *, progress: Progress) -> list[str]:
    """Write the model and tokenizer in `gguf` to `folder` as bf16 safetensors that transformers loads; return what to say of it.

    Raises:
        BadInputError: transformers has no place for a tensor or a setting of it.
        TameError: transformers cannot read it: an architecture it does not know, a damaged file, missing tensors.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    progress(f"dequantize {gguf.name}", 0, 3)
    parts = read_parts(gguf)
    header = as_one(parts)
    check_gguf(header)
    whole = gguf
    if len(parts) > 1:
        whole = folder / f"{model_name(gguf)}.gguf"
        join(parts, whole)
    try:
        config = AutoConfig.from_pretrained(whole.parent, gguf_file=whole.name)
        _apply_settings(config, header)
        frequencies = _apply_rope(config, header)
        _refuse_inflated(config, header)
        # dequantize=True: without it, transformers keeps the weights packed and cannot save them.
        model, report = AutoModelForCausalLM.from_pretrained(
            whole.parent,
            config=config,
            gguf_file=whole.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        progress(f"dequantize {gguf.name}", 2, 3)
        notes = _refuse_incomplete(model, report, header)
        if frequencies is not None:
            _check_frequencies(model, header, frequencies)
        tokenizer = AutoTokenizer.from_pretrained(whole.parent, gguf_file=whole.name)
    except TameError:
        raise
    except Exception as error:  # whatever a file can break in the constructors of many models
        raise TameError(
            f"{gguf}: transformers cannot read it ({type(error).__name__}: {line(error)}); give the original model"
        ) from error
    if len(parts) > 1:
        whole.unlink()
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress(f"dequantize {gguf.name}", 3, 3)
    return notes


def _refuse_inflated(config: Any, header: GgufHeader) -> None:
    """Refuse settings of a model of several times the file's numbers: one wrong byte of a size would take all memory.

    Raises:
        TameError: the settings ask for several times as many numbers as the file has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    if described > 2 * held:
        raise TameError(
            f"{header.path}: its settings describe a model of {described} numbers, but it holds {held}; download it again"
        )


def _refuse_incomplete(model: Any, report: dict[str, Any], header: GgufHeader) -> list[str]:
    """Refuse a model that is not all that the file holds, or not only that.

    Raises:
        BadInputError: a tensor of the file that the model has no place for.
        TameError: a tensor of the model that the file lacks.
    """
    name = type(model).__name__
    if missing := sorted(report["missing_keys"]):
        raise TameError(
            f"{header.path}: no tensor for {missing[0]} of {name} ({len(missing)} are missing in all); transformers would "
            "fill it with random numbers. Download it again"
        )
    if mismatched := sorted(report["mismatched_keys"]):
        tensor, stored, expected = mismatched[0]
        raise TameError(
            f"{header.path}: {tensor} has the shape {list(stored)}, but its settings give {name} {list(expected)} "
            f"({len(mismatched)} tensors in all); download it again"
        )
    loaded = _loaded(model, header)
    ignored = [
        tensor for tensor in header.tensors.values() if tensor.name not in loaded and tensor.name not in ROPE_TENSORS
    ]
    predicting = f"blk.{model.config.get_text_config().num_hidden_layers}."  # heads that predict several tokens
    if dropped := [tensor for tensor in ignored if not tensor.name.startswith(predicting)]:
        raise BadInputError(
            f"{header.path}: transformers' {name} has no place for {dropped[0].name} {list(dropped[0].shape)} and would leave "
            f"it out ({len(dropped)} tensors in all); give the original model"
        )
    held = sum(tensor.numel() for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    filled = sum(math.prod(tensor.shape) for tensor in header.tensors.values() if tensor.name in loaded)
    if filled < held:
        raise TameError(
            f"{header.path}: it holds {filled} numbers, but {name} has {held}; transformers would make up the rest. "
            "Download it again"
        )
    if not ignored:
        return []
    return [
        f"{len(ignored)} tensors of {header.path.name}, such as {ignored[0].name}, are no part of {name} in transformers and "
        "are left out."
    ]


def _loaded(model: Any, header: GgufHeader) -> set[str]:
    """The tensors of the file that transformers loads."""
    from transformers.integrations.gguf import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if is_gguf_arch_supported(header.architecture):
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        mapping = get_gguf_conversion_mapping(header.architecture, model.config)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        expected = model.state_dict()
        return {name for name in header.tensors if rename_source_key(name, renamings, converters)[0] in expected}
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    # Stacked experts are looked up without the suffix.
    return {name for name in header.tensors if name in places or name.removesuffix(".weight") in places}


def _apply_settings(config: Any, header: GgufHeader) -> None:
    """Set what of the file's settings transformers has not read, or refuse one that it has no name for."""
    text = config.get_text_config()
    context = header.setting("context_length") or 0
    for setting, names in SETTINGS.items():
        value = header.setting(setting)
        neutral = not value or value == NEUTRAL.get(setting)
        if isinstance(value, list) or (neutral and value is not False):
            continue
        if setting == "attention.sliding_window" and value >= context:
            continue
        name = next((name for name in names if hasattr(text, name)), None)
        if name is None and value is not False:
            raise BadInputError(
                f"{header.path}: {header.architecture}.{setting} is {value:g}, which transformers' "
                f"{type(text).__name__} has no name for; give the original model"
            )
        if name is not None and not _close(getattr(text, name), value):
            setattr(text, name, value)
    if header.architecture != "gemma4" and getattr(text, "head_dim", None) is not None:
        text.head_dim = header.setting("attention.key_length") or text.head_dim
    # llama.cpp tells by the number of blocks which of these models divide by something else than the heads' size.
    if hasattr(text, "query_pre_attn_scalar"):
        largest = (header.architecture, header.setting("block_count")) in {("gemma2", 46), ("gemma3", 62)}
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads if largest else text.head_dim


def _apply_rope(config: Any, header: GgufHeader) -> list[float] | None:
    """Set how positions are rotated, and return the frequencies that this must give; None where that is not known.

    Raises:
        BadInputError: frequencies, or a scaling of them, that transformers has no name for.
    """
    text = config.get_text_config()
    theta, heads = header.setting("rope.freq_base"), header.setting("attention.head_count")
    rope = getattr(text, "rope_parameters", None)
    if not isinstance(rope, dict) or not isinstance(heads, int) or not heads:
        if unused := [name for name in ROPE_TENSORS if name in header.tensors]:
            raise BadInputError(f"{header.path}: transformers would leave out its {unused[0]}; give the original model")
        return None
    rope = rope.get("full_attention") or rope
    head = header.setting("attention.key_length") or header.setting("embedding_length") // heads
    size = header.setting("rope.dimension_count") or head
    if "partial_rotary_factor" in rope or size != head:
        rope["partial_rotary_factor"] = size / head
    rope["rope_theta"] = theta = theta or rope.get("rope_theta") or 10000.0
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    kind, factor = header.setting("rope.scaling.type"), header.setting("rope.scaling.factor") or 1.0
    original = header.setting("rope.scaling.original_context_length")
    if ROPE_TENSORS[1] in header.tensors or ROPE_TENSORS[2] in header.tensors:
        rope |= _longrope(header, size // 2)
        text.original_max_position_embeddings = original
        return None
    if kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor}
        if original:
            rope["original_max_position_embeddings"] = original
        return None
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
        return [frequency / factor for frequency in plain]
    if kind not in (None, "none", "linear"):
        raise BadInputError(
            f"{header.path}: its rope.scaling.type is {kind!r}, which is not read; give the original model"
        )
    if frequencies := header.tensors.get("rope_freqs.weight"):
        factors = _floats(header, frequencies)
        if len(factors) == len(plain) and any(abs(value - 1) > TOLERANCE for value in factors) and max(factors) < 1e6:
            rope |= _llama3(factors, plain, header.path)
        return [frequency / value for frequency, value in zip(plain, factors, strict=False)]
    return plain


def _longrope(header: GgufHeader, count: int) -> dict[str, Any]:
    """The settings of Phi-3's scaling, one factor for each of `count` frequencies.

    Raises:
        BadInputError: some of the factors are missing.
    """
    long, short = (_floats(header, header.tensors[name]) if name in header.tensors else [] for name in ROPE_TENSORS[1:])
    original = header.setting("rope.scaling.original_context_length")
    if len(long) != count or len(short) != count or not original:
        raise BadInputError(
            f"{header.path}: transformers would leave out its rope_factors_long.weight and rope_factors_short.weight, as they "
            f"are not {count} factors each with an original_context_length; give the original model"
        )
    found = {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
    }
    if attention := header.setting("rope.scaling.attn_factor"):
        found["attention_factor"] = attention
    return found


def _llama3(factors: list[float], plain: list[float], path: Path) -> dict[str, Any]:
    """The settings of Llama 3.1's scaling that `factors` were computed with; they are in no .gguf.

    Raises:
        BadInputError: no settings give these factors.
    """
    factor, low, high = round(max(factors), 3), 1.0, 4.0
    for context in LLAMA3_CONTEXTS:
        expected = []
        for frequency in plain:
            waves = context * frequency / (2 * math.pi)
            smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
            expected.append(1 / ((1 - smooth) / factor + smooth))
        if all(_close(a, b) for a, b in zip(expected, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise BadInputError(
        f"{path}: its rope_freqs.weight is not Llama 3.1's scaling, and transformers would leave it out; give the original model"
    )


def _check_frequencies(model: Any, header: GgufHeader, expected: list[float]) -> None:
    """Check that the model rotates positions as the file says."""
    found = [b.tolist() for name, b in model.named_buffers() if name.rpartition(".")[2].endswith("inv_freq")]
    kept = [frequency for frequency in expected if frequency > 1e-9]  # what llama.cpp divides by 1e30 is not rotated
    for frequencies in found:
        turning = [frequency for frequency in frequencies if frequency > 1e-9]
        if len(turning) == len(kept) and all(_close(a, b) for a, b in zip(turning, kept, strict=True)):
            return
    if found:
        raise BadInputError(
            f"{header.path}: transformers' {type(model).__name__} would rotate positions otherwise than the file says "
            "(rope.freq_base, rope.dimension_count, rope_freqs.weight); give the original model"
        )


def _floats(header: GgufHeader, tensor: GgufTensor) -> list[float]:
    import numpy as np

    if tensor.kind != 0:
        raise BadInputError(f"{header.path}: {tensor.name} is not F32; give the original model")
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return [float(value) for value in np.frombuffer(file.read(tensor.end - tensor.start), dtype="<f4")]


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool) or not isinstance(one, int | float):
        return bool(one == other)
    return math.isclose(one, other, rel_tol=TOLERANCE)
