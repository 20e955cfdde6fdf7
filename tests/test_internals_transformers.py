"""What quantizing takes from inside transformers, and bitsandbytes, is there, with the signature that is relied on.

No promise of these libraries covers it. When a new version fails here, look at tasks/transformers_adapter.py, or at the
method's file; `test_quantize.py` says whether the bytes are still the same.
"""

import inspect
from importlib import import_module
from typing import Any

import pytest

CALLED: dict[str, tuple[str, ...]] = {
    "transformers.conversion_mapping:get_model_conversion_mapping": ("model", "key_mapping", "hf_quantizer"),
    "transformers.core_model_loading:WeightConverter": ("source_patterns", "target_patterns"),
    "transformers.core_model_loading:WeightRenaming": ("source_patterns", "target_patterns"),
    "transformers.core_model_loading:dot_natural_key": ("s",),
    "transformers.core_model_loading:rename_source_key": (
        "source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict",
    ),
    "transformers.core_model_loading:revert_weight_conversion": ("model", "state_dict"),
    "transformers.dynamic_module_utils:get_class_from_dynamic_module": (
        "class_reference", "pretrained_model_name_or_path",
    ),
    "transformers.modeling_utils:PreTrainedModel._get_dtype_plan": ("self", "dtype"),
    "transformers.modeling_utils:PreTrainedModel.get_init_context": (
        "dtype", "is_quantized", "_is_ds_init_called", "allow_all_kernels",
    ),
    "transformers.modeling_utils:PreTrainedModel.tie_weights": ("self", "missing_keys", "recompute_mapping"),
    "transformers.modeling_utils:remove_tied_weights_from_state_dict": ("state_dict", "model"),
    "transformers.quantizers:AutoHfQuantizer.from_config": ("quantization_config", "kwargs"),
    "transformers.quantizers.base:HfQuantizer.param_needs_quantization": ("self", "model", "param_name"),
    "transformers.quantizers.base:HfQuantizer.preprocess_model": ("self", "model", "dtype", "kwargs"),
    "transformers.quantizers.base:get_keys_to_not_convert": ("model",),
    "transformers.quantizers.quantizers_utils:should_convert_module": ("full_name", "patterns"),
    "bitsandbytes.functional:QuantState": (
        "absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2",
    ),
    "bitsandbytes.functional:QuantState.as_dict": ("self", "packed"),
    "bitsandbytes.functional:QuantState.from_dict": ("qs_dict", "device"),
    "bitsandbytes.functional:dequantize_4bit": ("A", "quant_state"),
    "bitsandbytes.functional:dequantize_blockwise": ("A", "quant_state"),
    "bitsandbytes.functional:get_4bit_type": ("typename", "device", "blocksize"),
    "bitsandbytes.functional:int8_vectorwise_quant": ("A", "threshold"),
    "bitsandbytes.functional:quantize_blockwise": ("A", "code", "absmax", "out", "blocksize"),
}  # fmt: skip
"""Each thing that is called, by module and name, and its parameters in this order; others may follow, or come between."""


def found(place: str) -> Any:
    module, _, name = place.partition(":")
    thing: Any = import_module(module)
    for part in name.split("."):
        assert hasattr(thing, part), f"{module} has no {name} any more"
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("place", CALLED)
def test_what_is_called_takes_what_it_is_given(place: str) -> None:
    parameters = list(inspect.signature(found(place)).parameters)
    missing = [name for name in CALLED[place] if name not in parameters]
    assert not missing, f"{place} takes {', '.join(parameters)}; tame counts on {', '.join(missing)}"
    order = [name for name in parameters if name in CALLED[place]]
    assert order == list(CALLED[place]), f"{place} takes its parameters in another order: {', '.join(order)}"


def test_a_model_says_of_itself_what_is_read() -> None:
    import torch
    import transformers
    from transformers.core_model_loading import WeightRenaming
    from transformers.pytorch_utils import Conv1D

    from tests.models import zoo

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(zoo("qwen3-tied"))
        gpt2 = transformers.AutoModelForCausalLM.from_config(zoo("gpt2"))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.base_model_prefix == "model"
    assert model.can_generate()
    for name in (
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_save",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_weight_conversions",
    ):
        assert hasattr(model, name) or name == "_weight_conversions", f"models have no {name} any more"
    assert "_weight_conversions" in inspect.getsource(found("transformers.core_model_loading:revert_weight_conversion"))
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, Conv1D)
    assert not WeightRenaming(source_patterns="a", target_patterns="b").was_used()
    config = zoo("llava")
    assert set(config.sub_configs) == {"text_config", "vision_config"}
    mapping = transformers.AutoModelForCausalLM._model_mapping
    assert type(zoo("llama")) in mapping.keys()  # noqa: SIM118
    assert mapping[type(zoo("llama"))] is transformers.LlamaForCausalLM


def test_a_quantizer_replaces_layers_and_says_which_weights_it_takes() -> None:
    import torch
    import transformers
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    from tests.models import zoo

    config = BitsAndBytesConfig(load_in_4bit=True)
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(zoo("llama"))
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map={"": "cpu"}, checkpoint_files=[])
    names = {name for name, _ in model.named_parameters() if quantizer.param_needs_quantization(model, name)}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not names & {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert quantizer.quantization_config.to_dict()["load_in_4bit"] is True


def test_the_operator_of_4_bit_kernels_gives_codes_and_scales() -> None:
    import bitsandbytes  # noqa: F401  it registers the operator
    import torch

    codes, scales = torch.ops.bitsandbytes.quantize_4bit.default(torch.ones(2, 64), 64, "nf4", torch.uint8)
    assert (codes.shape, codes.dtype) == ((64, 1), torch.uint8)
    assert scales.tolist() == [1.0, 1.0]
