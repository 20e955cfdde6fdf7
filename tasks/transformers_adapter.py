"""All of transformers' internals that calibrate and quantize rely on, in one place, with transformers' own names beside it.

What is quantized is what transformers quantizes: its own quantizer replaces the linear layers of a model without weights, and
its own conversion mappings rename the checkpoint's tensors on the way in and out. Nothing here knows an architecture.
"""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInputError
from configs.schema import Variant
from tasks.download.architectures import EMBEDDING_FILES
from tasks.download.checkpoint import INDEX, Stored

AUTO = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|masked_bias|position_ids|token_type_ids|cos_cached|sin_cached)$"
)
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Selection:
    """What of a model is quantized, and what its config.json says of it."""

    quantization_config: dict[str, Any]
    includes: Callable[[str], bool]
    """Whether the weight of this name, as the model calls it, is quantized."""
    quantizer: Any = None
    """transformers' HfQuantizer, where it is what decides: it may rename tensors too."""
    variant: Variant | None = None
    """The variant with all decided that it had left open; None where it had left nothing."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a weight is not quantized, by its name, where that is the format's own reason."""
    variants: dict[str, Variant] = field(default_factory=dict)
    """What single weights are quantized as, by their names, where that is another variant than the checkpoint's."""
    lists: tuple[str, ...] = ()
    """The keys of `quantization_config` under which modules are listed by their names."""


def select_as_transformers(config: Any, model: Any, dtype: torch.dtype, pre_quantized: bool = False) -> Selection:
    """What transformers would quantize by `config`, a QuantizationConfigMixin or what config.json has of one.

    Replaces the model's layers, as `from_pretrained` does before it loads weights.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=pre_quantized)
    prepare(quantizer, model, dtype)
    return Selection(
        quantization_config=quantizer.quantization_config.to_dict(),
        includes=lambda name: bool(quantizer.param_needs_quantization(model, name)),
        quantizer=quantizer,
    )


def loading_quantizer(config: dict[str, Any]) -> Any:
    """The HfQuantizer that loads a checkpoint whose config.json has this `quantization_config`."""
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    quantizer.validate_environment(device_map={"": "cpu"})
    return quantizer


def prepare(quantizer: Any, model: Any, dtype: torch.dtype) -> None:
    """Replace the model's layers by what a checkpoint is loaded into, as `from_pretrained` does before it loads weights."""
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=[])


def loaded_in_parts(model: Any, quantizer: Any) -> Callable[[str], bool]:
    """A function from a parameter's name to whether transformers can make it from several quantized weights, as of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    (names,) = quantizer.serialized_names.values()
    endings = tuple(f".{name}" for name in names if name != "weight")
    parts = [
        conversion.reverse_transform()
        for conversion in get_model_conversion_mapping(model, None, quantizer)
        if any(pattern.endswith(endings) for pattern in getattr(conversion, "_original_source_patterns", []))
        and getattr(conversion, "operations", [])
    ]
    return lambda name: any(conversion.rename_source_key(name)[1] is not None for conversion in parts)


def read_model_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration in a folder, as an object."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def model_class(config: Any, folder: Path, trust_remote_code: bool) -> Any:
    """The class that config.json names, or what transformers' auto classes would take.

    Raises:
        BadInputError: this transformers does not know it.
    """
    import transformers

    if any(
        (folder / file).is_file() for file in EMBEDDING_FILES
    ):  # sentence-transformers takes the model without a head
        headless = transformers.AutoModel._model_mapping
        if type(config) in headless.keys():  # noqa: SIM118
            return headless[type(config)]
    name = (config.architectures or [""])[0]
    remote = getattr(config, "auto_map", None) or {}
    for auto in AUTO:
        if trust_remote_code and auto in remote:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            return get_class_from_dynamic_module(remote[auto], str(folder))
    if name and (found := getattr(transformers, name, None)) is not None:
        return found
    for auto in AUTO:
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping.keys():  # noqa: SIM118
            return mapping[type(config)]
    raise BadInputError(
        f"{folder / 'config.json'}: transformers {transformers.__version__} has no {name or config.model_type}; it takes "
        "language models that this version knows"
    )


def language_model_class(config: Any) -> Any:
    """The auto class that loads a language model; one that reads images too is loaded with all of its parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own = getattr(config, "auto_map", None) or {}
    causal = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in own
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def import_modelling(config: Any) -> None:
    """Import the code of the model that has this configuration, as `from_pretrained` of a language model does."""
    mapping = language_model_class(config)._model_mapping
    if type(config) in mapping:
        mapping[type(config)]


def dtype_of(config: Any, folder: Path, tensors: dict[str, Stored]) -> torch.dtype:
    """The dtype in which `from_pretrained` loads the model, as its `_get_dtype` and `get_state_dict_dtype` find it.

    That is what config.json says, else what the index says, else that of the first floating-point tensor, by name, of the
    first file, by name.
    """
    if (dtype := getattr(config, "dtype", None)) is not None:
        return _named(dtype)
    files = {tensor.file for tensor in tensors.values()}
    if len(files) > 1 and (dtype := json.loads((folder / INDEX).read_bytes()).get("metadata", {}).get("dtype")):
        return _named(dtype)
    first = (tensors[name].dtype for name in sorted(tensors) if tensors[name].file == min(files))
    return next((FLOATS[dtype] for dtype in first if dtype in FLOATS), torch.float32)


def _named(dtype: Any) -> torch.dtype:
    named: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return named


def set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Set the dtype of a model and of all its parts, as `_get_dtype` does."""
    config.dtype = dtype
    for key in config.sub_configs:
        if (part := getattr(config, key, None)) is not None:
            part.dtype = dtype


def building(cls: Any, dtype: torch.dtype) -> ExitStack:
    """The contexts in which `from_pretrained` makes a model and replaces its layers."""
    stack = ExitStack()
    for context in cls.get_init_context(dtype, is_quantized=True, _is_ds_init_called=False, allow_all_kernels=None):
        stack.enter_context(context)
    return stack


def skipped_by_default(model: Any) -> list[str]:
    """The modules that transformers leaves unquantized where nobody names any."""
    from transformers.quantizers.base import get_keys_to_not_convert

    names: list[str] = get_keys_to_not_convert(model)
    return names


def is_skipped(module: str, patterns: Iterable[str]) -> bool:
    """Whether transformers leaves the module unquantized because of these patterns."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def needs_weights(model: Any, names: Iterable[str]) -> str | None:
    """The class of a module that `from_pretrained` cannot initialize where these linear weights are packed: T5's attention."""
    layers = [model.get_submodule(name.removesuffix(".weight")) for name in names if name.endswith(".weight")]
    whole = [dict(layer._parameters) for layer in layers]
    try:
        for layer in layers:
            del layer._parameters["weight"]
        for module in model.modules():
            with suppress(RuntimeError, NotImplementedError):  # of numbers that a model without weights does not have
                model._init_weights(module)
    except AttributeError:
        return type(module).__name__
    finally:
        for layer, parameters in zip(layers, whole, strict=True):
            layer._parameters.clear()
            layer._parameters.update(parameters)
    return None


def transposed_modules(model: Any) -> set[str]:
    """The names of modules whose weights are stored as [in, out]: GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def natural_order(names: Iterable[str]) -> list[str]:
    """Names in the order in which transformers goes through them: layer 2 before layer 10."""
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def match(model: Any, quantizer: Any, tensors: dict[str, Stored]) -> tuple[dict[str, list[Stored]], set[str]]:
    """Which tensors each of the model's is loaded from, and which of the model's transformers computes from several.

    The same renaming, in the same order, as transformers' loading of a checkpoint. Tensors that match nothing are dropped,
    as there. The model remembers which conversions it needed, for `reverted`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, list[Stored]] = {}
    fused: set[str] = set()
    for original in natural_order(tensors):
        name, pattern = rename_source_key(original, renamings, converters, prefix, expected)
        if name not in expected and original in expected:
            name, pattern = rename_source_key(original, [], [], prefix, expected)
        if name not in expected:
            continue
        sources.setdefault(name, []).append(tensors[original])
        if pattern is not None:
            targets = by_pattern[pattern].target_patterns
            fused |= {name.replace(targets[0], target) for target in targets}
    model._weight_conversions = [c for c in conversions if c.was_used()]
    return sources, fused


def reverted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` under the names of a checkpoint, in the order in which `save_pretrained` goes through them."""
    from transformers.core_model_loading import revert_weight_conversion

    if model._weight_conversions:
        renamed: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
        return renamed
    # transformers would only sort them, and compile a pattern for each name: as long as all else here
    return {name: state[name] for name in natural_order(state)}


def as_saved(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` under the names that checkpoints of such a model usually have, where no checkpoint was looked at."""
    from transformers.core_model_loading import revert_weight_conversion

    renamed: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return renamed


def tied(model: Any) -> dict[str, str]:
    """Names of weights that are others' under another name, and whose; taking one out unties it."""
    names: dict[str, str] = model.all_tied_weights_keys
    return names


def tie(model: Any, missing: set[str]) -> None:
    """Tie those weights that are missing in the checkpoint and are another one under another name; they leave `missing`."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)


def computed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a buffer of older checkpoints, which transformers now computes: rotary frequencies, masks, positions."""
    return bool(BUFFERS.search(name)) or (
        name.endswith(".bias") and len(shape) == 4
    )  # GPT-2's causal mask, as it was named


def made_up(model: Any, missing: set[str]) -> list[str]:
    """Which of the missing tensors transformers would fill with random numbers, rather than compute or do without."""
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sorted(name for name in missing & parameters if not any(re.search(pattern, name) for pattern in ignored))


def without_tied(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` without the second names of tied weights, as `save_pretrained` leaves them out."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(state, model)
    return left


def kept_dtypes(model: Any, dtype: torch.dtype) -> Callable[[str], torch.dtype | None]:
    """A function from a tensor's name to the dtype that the model insists on for it, such as float32 for T5's `wo`."""
    plan = model._get_dtype_plan(dtype)
    kept = {re.compile(pattern.replace("*", ".*")): kind for pattern, kind in plan.items()}
    return lambda name: next((kind for pattern, kind in kept.items() if pattern.search(name)), None)


def load_some(model: Any, state: dict[str, Any], device: torch.device) -> None:
    """Load a part of a checkpoint into a model on the meta device, as `from_pretrained` loads all of it.

    `state` has tensors, or slices of safetensors files, by the checkpoint's names: for every parameter either all that it is
    made from or none.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=model._get_dtype_plan(model.dtype),
        weight_mapping=get_model_conversion_mapping(model, None, None),
    )
    with torch.no_grad():
        convert_and_load_state_dict_in_model(model, state, config)


def make_buffers(model: Any, device: torch.device) -> None:
    """Give a model on the meta device the buffers that no checkpoint holds, such as rotary frequencies."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device=device)
    with torch.no_grad():
        model.initialize_weights()
