"""The methods that a recipe can name, and the options that each of them takes.

What a method does is in tasks/quantize/methods/. A new one has a line here and a line there.
"""

from typing import Literal, get_args

FOUR_BIT = "the 4-bit methods nf4 and fp4"

FOR_VLLM = "the methods for vLLM: w4a16, w8a16, w8a8, fp8, fp8-block, mxfp4 and nvfp4"

OPTIONS = {
    "double_quant": FOUR_BIT,
    "compute_dtype": FOUR_BIT,
    "calibrate": "nf4, fp4 and w4a16",
    "fit": "nf4, fp4, w4a16 and w8a16",
    "group_size": "nf4, fp4, w4a16 and w8a16",
    "scale": FOR_VLLM,
    "eight_bit_modules": "w4a16",
    "small_group_modules": FOUR_BIT,
}
"""Options of a variant that only some methods take, and which these are, in words."""

METHODS: dict[str, tuple[str, ...]] = {
    "int8": (),
    "nf4": ("double_quant", "compute_dtype", "group_size", "calibrate", "fit", "small_group_modules"),
    "fp4": ("double_quant", "compute_dtype", "group_size", "calibrate", "fit", "small_group_modules"),
    "w4a16": ("group_size", "scale", "calibrate", "fit", "eight_bit_modules"),
    "w8a16": ("group_size", "scale", "fit"),
    "w8a8": ("scale",),
    "fp8": ("scale",),
    "fp8-block": ("scale",),
    "mxfp4": ("scale",),
    "nvfp4": ("scale",),
}
"""Each method's name, and those of OPTIONS that it takes."""

WITH_EXPERTS = ("w4a16", "w8a16", "fp8", "fp8-block", "mxfp4")
"""The methods that quantize the experts of a mixture, too."""
INTEGER_METHODS = ("w4a16", "w8a16", "w8a8")
"""The methods with one scale for many integers, which takes next to no space."""

Runtime = Literal["vllm", "transformers", "peft"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
"""The programs that a checkpoint can be opened with, to see that they do; tasks/serve/runtimes.py says how."""
