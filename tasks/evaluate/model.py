"""A checkpoint, loaded as its users will load it."""

import functools
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from configs.errors import BadInputError, TameError, line
from tasks.download.architectures import IMAGES, table
from tasks.download.text import check_loaded_tokenizer
from tasks.evaluate.cpu_float32 import slow
from tasks.evaluate.float16 import dtype_on, follow
from tasks.evaluate.memory import free_memory, out_of_memory, synchronize
from tasks.evaluate.output_head import Head, find_head
from tasks.quantize.methods import libraries, method_of_source, of_family, opened_on
from tasks.quantize.protocols import SourceReader
from tasks.runtime.quiet import quieten

log = logging.getLogger("tame.evaluate")

MEASURING = ("accelerate", "datasets", "lm_eval", "lm-eval", "huggingface_hub", "filelock", "kernels")
"""Loggers of libraries that an evaluation uses."""


@dataclass
class Loaded:
    """A model in evaluation mode. `weights` says how its layers compute, for the protocol."""

    model: Any
    tokenizer: Any
    device: str
    """Where inputs go."""
    dtype: str
    weights: str
    seconds: float
    """What loading took, imports excluded; the files were in the page cache, or not, as it happened."""
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def head(self) -> Head:
        """The output head, verified when it is first asked for.

        Raises:
            TameError: tame cannot repeat this architecture's head.
        """
        return find_head(self.model, self.device)

    def tokens(self, text: str, special: bool = True) -> Any:
        """The tokens of `text` [1, tokens] on the model's device, at least one; `special`: with what the tokenizer adds.

        Raises:
            BadInputError: as `check_tokens`.
        """
        import torch

        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"] or [self.tokenizer.eos_token_id or 0]
        self.check_tokens(ids)
        return torch.tensor([ids], device=self.device)

    def check_tokens(self, ids: ArrayLike) -> None:
        """Check that the model has an embedding for every token. An index out of range would crash without a reason.

        Raises:
            BadInputError: the tokenizer makes tokens that the model does not have.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        highest = int(np.max(ids, initial=0))
        if highest >= rows:
            raise BadInputError(
                f"the tokenizer makes token {highest}, but the model has embeddings for {rows} tokens only, 0 to {rows - 1}; "
                "use the tokenizer that the model was made with"
            )


def quieten_measuring() -> None:
    """Silence the libraries that take part in an evaluation."""
    quieten([*libraries(), *MEASURING])


def load(path: Path, device: str, trust_remote_code: bool = False) -> Loaded:
    """Load the checkpoint in `path` through transformers, in the dtype it was saved in.

    A model that does not fit on the GPU is spread over all of them (device_map="auto").

    Raises:
        BadInputError: not a causal language model, or without a tokenizer.
        TameError: the checkpoint does not load, or there is no memory for it.
    """
    quieten_measuring()
    from transformers import AutoTokenizer

    from tasks.transformers_adapter import language_model_class

    config = _config(path, device, trust_remote_code)
    notes = _check_kind(config, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise BadInputError(
            f"{path}: no tokenizer that loads ({line(error)}); add the model's tokenizer files"
        ) from None
    check_loaded_tokenizer(tokenizer, path)
    quantized = getattr(config, "quantization_config", None) is not None
    _import_modelling(config)
    spread, dtype = _spread(path, device, config), dtype_on(device, config, notes)
    auto = language_model_class(config)
    started = time.perf_counter()
    try:
        model, report = auto.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            device_map=spread,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        follow(model.eval(), dtype)
        synchronize(device)
    except Exception as error:
        if out_of_memory(error):
            raise TameError(
                f"{path}: no memory to load it on {device} ({line(error)}); free some, or use a larger device"
            ) from None
        raise TameError(f"{path}: the checkpoint does not load ({type(error).__name__}: {line(error)})") from None
    seconds = time.perf_counter() - started
    if missing := sorted(report["missing_keys"]):  # transformers would draw them at random, and only warn
        raise TameError(f"{path}: the checkpoint lacks {missing[0]} ({len(missing)} tensors in all); make it again")
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        device=str(model.device) if spread == "auto" else device,
        dtype=str(model.dtype).removeprefix("torch."),
        weights="as stored" if quantized else "not quantized",
        seconds=seconds,
        notes=notes,
    )


def _config(path: Path, device: str, trust_remote_code: bool) -> Any:
    """The config that the checkpoint is opened with on `device`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise TameError(f"{path}: config.json is not one that transformers can load ({line(error)})") from None
    if (asked := getattr(config, "quantization_config", None)) is not None:
        config.quantization_config = opened_on(device, asked)
    return config


def _check_kind(config: Any, path: Path) -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise BadInputError(
            f"{path}: {kind} is an encoder-decoder, and perplexity over a text has no meaning for it; tame measures "
            "decoder-only language models"
        )
    own = getattr(config, "auto_map", None) or {}
    supported = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind in table(IMAGES)
    if not supported and "AutoModelForCausalLM" not in own:
        raise BadInputError(
            f"{path}: {kind} is not a causal language model that transformers knows; tame cannot measure it"
        )
    if config.get_text_config() is not config:
        return [
            f"{kind} takes more than text; only its language model was measured, and not what quantizing did to "
            "its other parts"
        ]
    return []


def _import_modelling(config: Any) -> None:
    """Import before the clock starts: loading is timed, Python's imports are not."""
    from tasks.transformers_adapter import import_modelling

    import_modelling(config)
    if method := of_family(getattr(config, "quantization_config", None)):
        method.tensor_format()  # imports the method's libraries, and quietens them


def _spread(path: Path, device: str, config: Any) -> Any:
    if not device.startswith("cuda"):
        return {"": device}
    import torch

    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    asked = getattr(config, "quantization_config", None)
    if isinstance(asked, dict) and asked.get("dequantize"):
        size *= 2  # from 8 bits to 16
    free, _ = torch.cuda.mem_get_info(device)
    if size * 1.1 < free:
        return {"": device}
    log.info(
        "%s: %.1f GB of weights do not fit in the %.1f GB free on %s; spreading over all devices",
        path,
        size / 1e9,
        free / 1e9,
        device,
    )
    return "auto"


def dequantize(loaded: Loaded) -> None:
    """Replace quantized layers by plain ones with the same weights, once, where that is the same arithmetic and fits.

    A weight-only format dequantizes to its compute dtype and multiplies. Doing that once instead of in every forward gives
    the same arithmetic several times faster; where a CPU has fast kernels for the stored weights (AVX512-BF16: 871 tokens/s
    of SmolLM2 beside 952), it is no slower. Nothing is tried out: a time must not decide which of the two is measured.
    `loaded.weights` says which it was, and where the arithmetic is not quite the same.
    """
    method = _method_of(loaded.model)
    if method is None or len(set(getattr(loaded.model, "hf_device_map", {"": 0}).values())) > 1:
        return
    dense = method.densify(loaded.model, int(0.6 * free_memory(loaded.device)))
    if isinstance(dense, str):
        loaded.notes.append(dense)
    elif dense is not None:
        rounded = not slow(next(loaded.model.parameters()))  # else the products are made in float32
        loaded.weights = dense.weights + (dense.difference if rounded else "")


def repacked(loaded: Loaded) -> bool:
    """Whether a forward has changed the stored weights, so that the model must be loaded again."""
    method = _method_of(loaded.model)
    return method is not None and method.altered(loaded.model)


def _method_of(model: Any) -> SourceReader | None:
    """What reads the format that a loaded model was quantized to."""
    return method_of_source(Path(model.name_or_path))  # the model forgets it when it is dequantized


def vocabulary(tokenizer: Any) -> str:
    """Canonical JSON of the tokenizer's vocabulary: two that are equal turn a text into the same ids."""
    return json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
