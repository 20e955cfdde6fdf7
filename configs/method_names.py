"""The methods that a recipe can name, and the options that each of them takes.

What a method does is in tasks/quantize/methods/. A new one has a line here and a line there.
"""

FOUR_BIT = "the 4-bit methods nf4 and fp4"

OPTIONS = {"double_quant": FOUR_BIT, "compute_dtype": FOUR_BIT, "calibrate": FOUR_BIT}
"""Options of a variant that only some methods take, and which these are, in words."""

METHODS: dict[str, tuple[str, ...]] = {
    "int8": (),
    "nf4": ("double_quant", "compute_dtype", "calibrate"),
    "fp4": ("double_quant", "compute_dtype", "calibrate"),
}
"""Each method's name, and those of OPTIONS that it takes."""
