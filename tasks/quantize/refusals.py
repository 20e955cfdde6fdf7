"""What config.json alone tells of a variant that cannot be made: for `tame plan`, before transformers is imported.

What needs the model's own layers to be known is found by `tasks.quantize.preview.check`, before anything is measured.
"""

from typing import Any

from configs.errors import BadInputError
from configs.method_names import INTEGER_METHODS
from configs.schema import Variant

NO_EXPERTS = ("w8a8", "nvfp4")
"""The methods of which transformers loads no experts that it makes of several tensors."""
STORED_FUSED = ("gpt_oss", "granitemoe", "dbrx", "llama4", "aria")
"""How the model types begin whose experts are one tensor in the checkpoint too."""


def check_variant(variant: Variant, config: dict[str, Any], experts: int, where: str) -> None:
    """Refuse what cannot be made of a model with this config.json, of whose parameters so many are in experts.

    Raises:
        BadInputError: a mixture in a format without experts, a group size that divides no row, a tied head in 8 bits, or codes
            that cannot be chosen.
    """
    text, size = config.get("text_config") or config, variant.group_size or 0
    refused = f"{where}: {variant.label}"
    if variant.method in NO_EXPERTS and experts and not str(text.get("model_type")).startswith(STORED_FUSED):
        raise BadInputError(
            f"{refused}: transformers loads no mixture of experts as {variant.method}; use fp8, w8a16 or w4a16"
        )
    if variant.calibrate and size < 0:
        raise BadInputError(
            f"{refused}: calibrate needs groups, and group_size is -1; use 32, 64 or 128, or leave calibrate out"
        )
    if "lm_head" in variant.eight_bit_modules and config.get("tie_word_embeddings") is True:
        raise BadInputError(
            f"{refused}: eight_bit_modules: lm_head is the embedding under another name in this model, which nothing opens in 8 "
            "bits; leave it out"
        )
    if size > 0 and variant.method in INTEGER_METHODS and not variant.skip_modules:
        for name in ("hidden_size", *([] if experts else ["intermediate_size"])):
            width = text.get(name)
            if isinstance(width, int) and width % size:
                fitting = [each for each in (128, 64, 32) if width % each == 0]
                raise BadInputError(
                    f"{refused}: group_size {size} does not divide the model's {name}, {width}; use "
                    f"{' or '.join(map(str, [*fitting, -1]))}, or leave it out"
                )
