"""NVFP4 of compressed-tensors, weights alone: 16 weights share an 8-bit scale, and a weight has one more scale in 32 bits.

Kernels fuse q, k and v, and gate and up, into one product, and read one such scale for all of it. So weights that are fused
get the same: that of the largest magnitude in any of them, as llm-compressor has it, vLLM's own tool for such checkpoints.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from configs.schema import Variant
from tasks.quantize.methods import compressed_tensors_format as usual
from tasks.quantize.methods.compressed_tensors_codes import FACTORS, Codes, in_pieces, levels_of, scheme_for, unpaired

GROUP = 16
FUSED = re.compile(
    r"^(?P<before>.*\.)(?:(?P<qkv>[qkv]_proj)|(?P<up>gate_proj|up_proj)|(?P<w>w[13])"
    r"|(?P<latent>q_a_proj|kv_a_proj_with_mqa))(?P<after>\.weight)?$"
)
"""Names of modules that vLLM fuses with others of their parent, by kind."""


@dataclass(frozen=True)
class Nvfp4:
    """The format; with `largest`, of one weight or several that share it."""

    largest: torch.Tensor | None = field(default=None, compare=False)
    """The largest magnitude of all weights that share a scale, in their own dtype."""

    select = staticmethod(usual.select)
    reselect = staticmethod(usual.reselect)
    grows = staticmethod(usual.grows)
    row_multiple = staticmethod(usual.row_multiple)
    plausible = staticmethod(usual.plausible)
    fault = staticmethod(usual.fault)

    def fused(self, weights: Iterable[str]) -> list[list[str]]:
        """Weights that share a scale, by their names; those that share it with none are alone."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in weights:
            match = FUSED.match(name)
            kind = (match["before"], _kind(match)) if match else (name, "")
            found.setdefault(kind, []).append(name)
        return list(found.values())

    def knowing(self, largest: torch.Tensor) -> "Nvfp4":
        """The same for weights of which this is the largest magnitude."""
        return Nvfp4(largest)

    def outputs(self, shape: tuple[int, int], dtype: torch.dtype, variant: Variant) -> dict[str, torch.Tensor]:
        """What is stored for a weight of `shape` [out, in], by name below its module, as meta tensors."""
        rows, columns = shape
        with torch.device("meta"):
            return {
                "weight_packed": torch.empty(rows, columns // 2, dtype=torch.uint8),
                "weight_scale": torch.empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn),
                "weight_global_scale": torch.empty(1),
            }

    def scale_count(self, shape: tuple[int, int], variant: Variant) -> int:
        """One for each group of 16."""
        return shape[0] * shape[1] // GROUP

    def quantize_rows(self, block: torch.Tensor, variant: Variant) -> Codes:
        """Quantize whole rows: their codes, two in a byte, and their scales, F32 [rows × groups]; on the block's device."""
        return in_pieces(block, lambda rows: self._quantize(rows, variant))

    def _quantize(self, rows: torch.Tensor, variant: Variant) -> Codes:
        grouped = rows.view(len(rows), -1, GROUP)
        least, most = torch.aminmax(grouped, dim=-1)
        weights, whole = scheme_for(variant).weights, self._global_scale().to(rows.device)

        def made(factor: float) -> tuple[torch.Tensor, torch.Tensor]:
            scale = calculate_qparams(least * factor, most * factor, weights, whole)[0]
            return scale, quantize_and_pack_fp4(rows, scale, global_scale=whole, group_size=GROUP)

        scale, codes = made(1)
        if variant.scale == "search":
            exact, levels = grouped.float(), levels_of(variant.method).to(rows.device)

            def error(scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
                read = levels[unpaired(codes).int()].view(grouped.shape) * (scale / whole).unsqueeze(-1)
                return (exact - read).square_().sum(-1)

            lost = error(scale, codes)
            for factor in FACTORS[1:]:
                other, theirs = made(factor)
                more = error(other, theirs)
                better = more < lost
                scale, lost = torch.where(better, other, scale), torch.minimum(more, lost)
            codes = quantize_and_pack_fp4(rows, scale, global_scale=whole, group_size=GROUP)
        return codes, scale.float().view(-1)

    def pack(
        self, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, variant: Variant
    ) -> dict[str, torch.Tensor]:
        """What is stored besides the codes."""
        scale = scales.view(shape[0], -1).to(torch.float8_e4m3fn)
        return {"weight_scale": scale, "weight_global_scale": self._global_scale()}

    def _global_scale(self) -> torch.Tensor:
        assert self.largest is not None, "the engine looks for the largest magnitude first"
        found: torch.Tensor = generate_gparam(-self.largest, self.largest)
        return found


def _kind(match: re.Match[str]) -> str:
    return next(kind for kind in ("qkv", "up", "w", "latent") if match[kind])
