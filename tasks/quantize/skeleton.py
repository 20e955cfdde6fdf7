"""A model without weights, as transformers would quantize it; and what it leaves unquantized."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInputError, TameError
from configs.schema import Variant
from tasks.download.checkpoint import Stored

AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def skeleton(
    folder: Path, variant: Variant, tensors: dict[str, Stored], trust_remote_code: bool = False
) -> tuple[Any, Any, torch.dtype]:
    """The model on the meta device, its linear layers replaced as inside `from_pretrained`; its quantizer; its dtype.

    Raises:
        BadInputError: transformers does not know the architecture, or a skipped module does not exist.
    """
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        cls = model_class(config, folder, trust_remote_code)
        dtype = _dtype(config, tensors)
        config.dtype = dtype
        for key in config.sub_configs:
            if (part := getattr(config, key, None)) is not None:
                part.dtype = dtype
        with _building(cls, dtype):
            model = cls(config)
            skip = None
            if variant.skip_modules:
                # transformers forgets what it would skip by itself as soon as a list is given, so both are given.
                skip = sorted({*get_keys_to_not_convert(model), *variant.skip_modules})
                _check_skips(model, variant, folder)
            quantizer = AutoHfQuantizer.from_config(_bnb_config(variant, skip, dtype), pre_quantized=False)
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=[])
    except TameError:
        raise
    except Exception as error:  # whatever a config.json can break in the constructors of hundreds of models
        raise BadInputError(
            f"{folder / 'config.json'}: transformers cannot make a model of it: {' '.join(str(error).split())[:300]}"
        ) from error
    return model, quantizer, dtype


def reloaded(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """The names of the weights that transformers would load from a quantized checkpoint as quantized ones."""
    from transformers import AutoConfig
    from transformers.quantizers import AutoHfQuantizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    cls = model_class(config, folder, trust_remote_code)
    quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    with _building(cls, config.dtype):
        model = cls(config)
        quantizer.preprocess_model(model=model, dtype=config.dtype, device_map={"": "cpu"}, checkpoint_files=[])
    tied = getattr(model, "all_tied_weights_keys", {})
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in tied]
    return {name for name in names if quantizer.param_needs_quantization(model, name)}


def left_out(
    model: Any, saved: dict[str, torch.Tensor], wanted: set[str], variant: Variant
) -> tuple[list[dict[str, Any]], list[str]]:
    """What is not quantized, by kind of module: {module, tensors, parameters, reason}, largest first; and what to say of it."""
    output = model.get_output_embeddings()
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in saved.items():
        if name in wanted:
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        reason = _reason(module, name, tensor, output, variant)
        groups.setdefault((pattern, reason), []).append(tensor.numel())
    left: list[dict[str, Any]] = [
        {"module": pattern, "tensors": len(sizes), "parameters": sum(sizes), "reason": reason}
        for (pattern, reason), sizes in groups.items()
    ]
    left.sort(key=lambda entry: -entry["parameters"])
    total = sum(tensor.numel() for tensor in saved.values())
    notes = []
    for entry in left:
        if entry["reason"] in (FUSED, OWN_CLASS) and entry["parameters"] > 0.01 * total:
            share = entry["parameters"] / total
            notes.append(f"{entry['module']} ({share:.0%} of the parameters) stays unquantized: {entry['reason']}.")
    return left, notes


FUSED = "fused expert weights, which transformers does not quantize with bitsandbytes"
OWN_CLASS = "a linear layer of the model's own class, which transformers does not quantize"


def _reason(module: Any, name: str, tensor: torch.Tensor, output: Any, variant: Variant) -> str:
    from torch import nn
    from transformers.quantizers.quantizers_utils import should_convert_module

    if module is output:
        return "output head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if name.endswith("bias"):
        return "bias"
    if tensor.ndim <= 1:
        return "norm or other vector"
    if not should_convert_module(name.rpartition(".")[0], list(variant.skip_modules)):
        return "skip_modules of the recipe"
    if tensor.ndim == 3 and not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return FUSED
    if type(module) is nn.Linear:
        return "tied, last, or kept in float32 by transformers"
    if isinstance(module, nn.Linear):
        return OWN_CLASS
    return "not a linear layer"


def _building(cls: Any, dtype: torch.dtype) -> ExitStack:
    stack = ExitStack()
    for context in cls.get_init_context(dtype, True, False, None):
        stack.enter_context(context)
    return stack


def _bnb_config(variant: Variant, skip: list[str] | None, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if variant.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=variant.method,
        bnb_4bit_use_double_quant=variant.double_quant,
        # transformers' own default is float32, which is what such a checkpoint then computes in, at a fraction of the speed.
        bnb_4bit_compute_dtype=variant.compute_dtype or dtype,
        llm_int8_skip_modules=skip,
    )


def model_class(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The class that config.json names, or what transformers' auto classes would take.

    Raises:
        BadInputError: this transformers does not know it.
    """
    import transformers

    name = (config.architectures or [""])[0]
    remote = getattr(config, "auto_map", None) or {}
    for auto in AUTO:
        if trust_remote_code and auto in remote:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(remote[auto], str(folder))
    if name and (known := getattr(transformers, name, None)) is not None:
        return known
    for auto in AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping.keys():  # noqa: SIM118
            return mapping[type(config)]
    raise BadInputError(
        f"{folder / 'config.json'}: transformers {transformers.__version__} has no {name or config.model_type}; it takes "
        "language models that this version knows"
    )


def _dtype(config: Any, tensors: dict[str, Stored]) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: what config.json says, else what the first floating-point tensor has."""
    if (dtype := getattr(config, "dtype", None)) is not None:
        named: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return named
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    return next((kinds[tensor.dtype] for tensor in tensors.values() if tensor.dtype in kinds), torch.float32)


def _check_skips(model: Any, variant: Variant, folder: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = [name for name, _ in model.named_modules()]
    for skip in variant.skip_modules:
        if all(should_convert_module(name, [skip]) for name in names):
            raise BadInputError(
                f"skip_modules: {skip!r} matches no module of {folder}, such as {names[-1]}; correct it"
            )
