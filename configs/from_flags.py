"""What the flags of `tame quantize`, `evaluate` and `serve-check` ask for, as the specs that a recipe would hold."""

import argparse
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from configs.errors import BadInputError
from configs.load import explain
from configs.method_names import METHODS
from configs.schema import Calibrate, Evaluate, Source, Variant

M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], /, **values: Any) -> M:
    """A `model` of these values.

    Raises:
        BadInputError: the values do not fit; in one line.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise BadInputError(explain(error, model)) from None


def source_of(options: argparse.Namespace, model: str) -> Source:
    """The source `model`, at --revision where the command has that flag."""
    revision = {"revision": options.revision} if hasattr(options, "revision") else {}
    return checked(Source, model=model, trust_remote_code=options.trust_remote_code, **revision)


def variant_of(options: argparse.Namespace) -> Variant:
    """The variant that `tame quantize` is to make."""
    names = ("method", "double_quant", "group_size", "scale", "fit")
    asked = {name: getattr(options, name) for name in names if getattr(options, name)}
    asked["compute_dtype"] = options.compute_dtype if "compute_dtype" in METHODS[options.method] else None
    if options.calibrate is not None:
        asked["calibrate"] = {"true": True}.get(options.calibrate_level, options.calibrate_level)
    return checked(Variant, **asked)


def calibration_of(options: argparse.Namespace) -> Calibrate:
    """What `--calibrate` and the flags that belong to it ask for.

    Raises:
        BadInputError: these flags without --calibrate, or values that do not fit.
    """
    given = {"sequences": options.calibrate_sequences, "length": options.calibrate_length}
    asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options.calibrate is None and (asked or options.calibrate_level != "true"):
        raise BadInputError("--calibrate-sequences, --calibrate-length and --calibrate-level need --calibrate FILE")
    if options.calibrate:
        asked["text"] = {"files": options.calibrate}
    return checked(Calibrate, **asked)


def evaluation_of(options: argparse.Namespace) -> Evaluate:
    """What `tame evaluate` is to measure."""
    names = ("window", "max_tokens", "tasks", "task_path", "task_limit", "task_new_tokens", "batch_size", "bos", "chat")
    given = {name: getattr(options, name) for name in names}
    asked = {key: value for key, value in given.items() if value is not None}
    for part in ("speed", "samples"):  # seconds to minutes of work that a recipe asks for, and here a flag
        asked |= {} if getattr(options, part) else {part: None}
    return checked(Evaluate, text={"files": options.text}, **asked)
