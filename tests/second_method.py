"""A second method, to prove that one file is all that a method is: 16-bit weights, stored as integers that have the same bits.

Importing this file adds the method `bits16` to tame's tables. `release` makes a release with it, in processes that know it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import method_names
from configs.schema import Variant
from tasks.quantize import methods
from tasks.quantize.protocols import CardText, Dense, Request, Restored, Written
from tasks.quantize.run import quantize_tensors
from tasks.runtime import child_process
from tasks.runtime.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from tasks.transformers_adapter import Selection

FAMILY = "bits16"


@dataclass(frozen=True)
class Bits16:
    """The method: its checkpoints hold the weights themselves, so that nothing is lost."""

    family = FAMILY
    libraries = ("numpy",)

    def bits(self, variant: Variant) -> int:
        return 16

    def card(self, variant: Variant) -> CardText:
        return CardText("16-bit integers", ("bits16-kernels",), ("16-bit",), ("Nothing but tame's tests reads it.",))

    def describes(self, quantization_config: dict[str, Any]) -> Variant | None:
        return Variant(method=FAMILY) if quantization_config.get("quant_method") == FAMILY else None

    def quantize(self, request: Request, progress: Progress = silent) -> Written:
        return quantize_tensors(self, request, progress)

    def tensor_format(self) -> "Format":
        return Format()

    def restore(self, parts: "dict[str, torch.Tensor]", shape: tuple[int, int], device: str) -> Restored:
        import torch

        assert parts["weight_shape"].tolist() == list(shape)
        flat = parts["weight_codes"].view(torch.bfloat16).reshape(-1)
        return Restored(lambda start, count: flat[start : start + count].to(device).float(), multiple=1)

    def choices(self, variant: Variant) -> list[Variant]:
        return [variant]

    def densify(self, model: Any, free: int) -> Dense | str | None:
        import torch

        for name, layer in list(model.named_modules()):
            if hasattr(layer, "weight_codes"):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = torch.nn.Parameter(layer.weight_codes.view(torch.bfloat16), requires_grad=False)
                model.set_submodule(name, plain)
        return Dense("integers read as bfloat16", "")

    def altered(self, model: Any) -> bool:
        return False


class Format:
    """What is stored for a weight: `weight_codes` and, as some formats have it, `weight_shape`."""

    def select(self, model: Any, variant: Variant, skip: list[str] | None, dtype: "torch.dtype") -> "Selection":
        return self.reselect(model, {"quant_method": FAMILY}, dtype)

    def reselect(self, model: Any, quantization_config: Any, dtype: "torch.dtype") -> "Selection":
        from tasks.transformers_adapter import Selection

        chosen = {f"{name}.weight" for name, _ in linear_layers(model)}
        return Selection({"quant_method": FAMILY}, chosen.__contains__)

    def outputs(self, shape: tuple[int, int], dtype: "torch.dtype", variant: Variant) -> "dict[str, torch.Tensor]":
        import torch

        with torch.device("meta"):
            return {
                "weight_codes": torch.empty(shape, dtype=torch.int16),
                "weight_shape": torch.empty(2, dtype=torch.int64),
            }

    def grows(self, name: str, variant: Variant) -> bool:
        return False

    def row_multiple(self, columns: int, variant: Variant) -> int:
        return 1

    def scale_count(self, shape: tuple[int, int], variant: Variant) -> int:
        return shape[0]

    def quantize_rows(self, block: "torch.Tensor", variant: Variant) -> "tuple[torch.Tensor, torch.Tensor]":
        import torch

        return block.view(torch.int16), block.abs().amax(1).float()

    def plausible(self, scales: "torch.Tensor") -> bool:
        return bool(scales.isfinite().all())

    def fault(self, block: "torch.Tensor", scales: "torch.Tensor") -> tuple[int, str] | None:
        return None

    def pack(
        self, scales: "torch.Tensor", shape: tuple[int, int], dtype: "torch.dtype", variant: Variant
    ) -> "dict[str, torch.Tensor]":
        import torch

        return {"weight_shape": torch.tensor(shape)}


def linear_layers(model: Any) -> list[tuple[str, Any]]:
    import torch

    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if type(m) is torch.nn.Linear and m is not head]


def teach_transformers() -> None:
    """Have transformers load these checkpoints, as a format's own library would."""
    import torch
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Layer(torch.nn.Module):
        def __init__(self, out_features: int, in_features: int) -> None:
            super().__init__()
            self.out_features, self.in_features = out_features, in_features
            codes = torch.empty(out_features, in_features, dtype=torch.int16, device="meta")
            self.weight_codes = torch.nn.Parameter(codes, requires_grad=False)
            shape = torch.empty(2, dtype=torch.int64, device="meta")
            self.weight_shape = torch.nn.Parameter(shape, requires_grad=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(hidden, self.weight_codes.view(torch.bfloat16))

    @register_quantization_config(FAMILY)
    class Config(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, **_: Any) -> None:
            self.quant_method = FAMILY

    @register_quantizer(FAMILY)
    class Quantizer(HfQuantizer):  # type: ignore[misc]
        requires_calibration = True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            for name, layer in linear_layers(model):
                model.set_submodule(name, Layer(layer.out_features, layer.in_features))

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False


method_names.METHODS[FAMILY] = ()
methods.METHODS[FAMILY] = Bits16()


def taught(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a process that has imported this file, and with a transformers that knows the format."""
    teach_transformers()
    return function(*args, **kwargs)


def release(recipe: str, out: str) -> None:
    """Run a recipe as `tame run` does where there is no Prefect, with processes that know the method."""
    plain: Callable[..., Any] = child_process.isolated
    setattr(child_process, "isolated", lambda what, *args, **kwargs: plain(what, taught, *args, **kwargs))  # noqa: B010
    from configs.load import load_recipe
    from flows.direct import DIRECT
    from flows.pipeline import make
    from tasks import result as results

    asked = load_recipe(Path(recipe))
    result = make(asked, Path(out), results.begin(asked, None), DIRECT)
    (Path(out) / "result.json").write_text(result.model_dump_json())
    raise SystemExit(result.exit_code)
