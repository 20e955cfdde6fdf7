"""One model, for somebody who has a minute: the form asks for six things, and the rest is what suits the model and the machine."""

from typing import Annotated

from prefect import flow
from prefect.states import Failed, State
from pydantic import Field, WithJsonSchema

from configs.errors import TameError
from configs.load import settled
from configs.method_names import METHODS
from configs.schema import Method, Recipe
from flows.release import release
from tasks.result import Result
from tasks.suggest import suggest

Format = Annotated[Method, WithJsonSchema({"enum": [*METHODS], "type": "string"})]
"""A method by its name; a recipe's variant that names a checkpoint has none."""
OWNER = r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$"


def _in_form(**bounds: str | float) -> dict[str, list[dict[str, str | float]]]:
    """Bounds where Prefect's form looks for them (see configs/schema.py)."""
    return {"allOf": [bounds]}


@flow(name="quantize", flow_run_name="{model}: {formats}")
def quantize(  # the fields of the form
    model: Annotated[str, Field(min_length=1, max_length=4096, json_schema_extra=_in_form(minLength=1))],
    formats: Annotated[list[Format], Field(min_length=1)] = ["nf4"],  # noqa: B006  the form shows only defaults that are values
    calibrate: bool = True,
    most_damage: Annotated[float, Field(ge=0, json_schema_extra=_in_form(minimum=0))] = 0.0,
    publish_to: Annotated[str, Field(pattern=OWNER, max_length=96, json_schema_extra=_in_form(pattern=OWNER))] = "",
    private: bool = True,
) -> State[Result]:
    """Quantize a model, measure what that costs, and publish what is close enough to the original.

    Args:
        model: A Hub repo such as Qwen/Qwen3-0.6B, or the path of a folder or .gguf on the worker.
        formats: nf4 and fp4 (4 bits) and int8 (8 bits) are for transformers and fine-tuning; the others are for vLLM.
        calibrate: Choose 4-bit codes on a text: the same size, about a fifth of the damage, minutes more.
        most_damage: KL divergence from the original, nats a token; what is further from it is not published. 0.1 is hardly
            noticed. 0 takes what suits the model's size.
        publish_to: Your name or organization on the Hub; the workers need HF_TOKEN with write access. Empty publishes nowhere.
        private: Visible to you alone on the Hub.
    """
    try:
        recipe = recipe_of(model, formats, calibrate, most_damage, publish_to, private)
    except TameError as error:
        return Failed(message=str(error))
    return release.fn(recipe, None)


def recipe_of(  # the fields of the form
    model: str,
    formats: list[Format],
    calibrate: bool = True,
    most_damage: float = 0.0,
    publish_to: str = "",
    private: bool = True,
) -> Recipe:
    """The recipe that the form asks for.

    Raises:
        BadInputError: there is no such model, or no format is asked for. TameError: the Hub does not answer.
    """
    level = "true" if calibrate and any("calibrate" in METHODS[name] for name in formats) else None
    made = suggest(
        model.strip(),
        to=",".join(formats),
        calibrate=level,
        publish=publish_to or None,
        limit=most_damage or None,
        private=private,
    )
    return settled(made.recipe, [])
