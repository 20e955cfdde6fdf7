"""The schemes of compressed-tensors that tame has, under tame's names."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """One scheme of compressed-tensors."""

    preset: str
    """Its name there."""
    stored: str
    """The name of its format, which config.json has."""
    bits: int
    numbers: str
    """What the card calls the weights."""
    tags: tuple[str, ...]
    activations: str = ""
    """What activations are quantized to while the model runs; empty where they are not."""

    @property
    def kind(self) -> str:
        """What config.json calls the numbers."""
        return "float" if "floats" in self.numbers else "int"

    @property
    def strategies(self) -> tuple[str, ...]:
        """What config.json may say that shares a scale."""
        return STRATEGIES[self.stored]


STRATEGIES = {
    "pack-quantized": ("group", "channel"),
    "int-quantized": ("channel",),
    "float-quantized": ("channel",),
    "nvfp4-pack-quantized": ("tensor_group",),
    "mxfp4-pack-quantized": ("group",),
}
"""By the name of the format."""


SCHEMES = {
    "w4a16": Scheme("W4A16", "pack-quantized", 4, "4-bit integers", ("4-bit", "int4", "w4a16")),
    "w8a16": Scheme("W8A16", "pack-quantized", 8, "8-bit integers", ("8-bit", "int8", "w8a16")),
    "w8a8": Scheme("W8A8", "int-quantized", 8, "8-bit integers", ("8-bit", "int8", "w8a8"), "8-bit integers"),
    "fp8": Scheme("FP8_DYNAMIC", "float-quantized", 8, "8-bit floats (E4M3)", ("8-bit", "fp8"), "8-bit floats"),
    "nvfp4": Scheme("NVFP4A16", "nvfp4-pack-quantized", 4, "4-bit floats (NVFP4)", ("4-bit", "fp4", "nvfp4")),
    "mxfp4": Scheme("MXFP4A16", "mxfp4-pack-quantized", 4, "4-bit floats (MXFP4)", ("4-bit", "fp4", "mxfp4")),
}
"""By tame's names."""
