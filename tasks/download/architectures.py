"""Which architectures the installed transformers knows, and which of them are language models that tame can release.

transformers' tables of architectures are in modules that import torch, which takes 5 s on a slow machine. They are literals, so
they are read from transformers' source, in 0.1 s. Everything that tame knows of that source is in this file.
"""

import ast
import functools
import importlib.util
from collections.abc import Container
from importlib.metadata import version
from pathlib import Path
from typing import Any

from configs.errors import BadInputError

CONFIGS, CAUSAL = "CONFIG_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
FILES = {CONFIGS: "auto_mappings.py", CAUSAL: "modeling_auto.py"}
HEADLESS = "MODEL_MAPPING_NAMES"
ENCODER_DECODER = "it is an encoder-decoder, for which perplexity over a text has no meaning"
SCORES = "it gives scores, as reward models do, not text"
LABELS = "it labels tokens, and writes none"
IMAGES = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
"""Models that read images beside text: their language model is measured by text alone."""
NO_TEXT = (
    "blip", "blip-2", "instructblip", "instructblipvideo", "git", "kosmos-2", "kosmos-2.5", "pix2struct",
    "vision-encoder-decoder", "udop", "florence2", "fuyu", "got_ocr2", "idefics", "mllama",
)  # fmt: skip
"""Those of them that write no text without an image, or with encoders of their own between."""
OTHERS = {
    IMAGES: "it writes text of images alone",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "it reads sound or images beside text",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "it turns speech into text",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": ENCODER_DECODER,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SCORES,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": LABELS,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "it marks a part of a text, and writes none",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "it fills gaps in a text, for which perplexity has no meaning",
}
"""Tables of architectures that are no causal language models, and what each of them does; the first that fits is told."""
SUFFIXES = {
    "ForSequenceClassification": SCORES,
    "RewardModel": SCORES,
    "ForReward": SCORES,
    "ForTokenClassification": LABELS,
    "Model": "it has no output head, as embedding models have none",
}
"""What a class does that transformers does not know, by the end of its name."""
BROKEN = dict.fromkeys(
    ("llama4", "llama4_text"),
    "transformers splits its experts when it saves them, and does not quantize them again when it loads them",
)
UNMEASURED = ", or write evaluate: null into the recipe, which quantizes and publishes it without measuring it"
EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def is_native(config: dict[str, Any]) -> bool:
    """Whether transformers has its own class for the model of this config.json, so that none of the model's code is needed."""
    kind, name = config.get("model_type"), _architecture(config)
    if not isinstance(kind, str) or kind not in table(CONFIGS):
        return False
    if not name:
        return kind in table(CAUSAL) or kind in table(IMAGES)
    return any(table(known).get(kind) == name for known in (CAUSAL, HEADLESS, *OTHERS))


def check_language_model(
    config: dict[str, Any], files: dict[str, int], top_tensors: list[str] | None, where: str, trust_remote_code: bool
) -> None:
    """Check, from what is known before a download, that a model can be measured: that it is a causal language model.

    `files` are the sizes of its files by name, `top_tensors` the names of its tensors that belong to no numbered layer, if they
    are known.

    Raises:
        BadInputError: the model is of another kind, which the message names by the class of its architecture.
    """
    _check_whole(config, where)
    own = config.get("auto_map")
    if trust_remote_code and isinstance(own, dict) and "AutoModelForCausalLM" in own:
        return
    instead = f"give a causal language model{UNMEASURED if is_native(config) else ''}"
    if embedding := [file for file in EMBEDDING_FILES if file in files]:
        raise BadInputError(
            f"{where}: it makes embeddings ({embedding[0]} says so), which tame cannot measure; {instead}"
        )
    _check_type(config, where)
    called = called_by(config)
    if reason := no_language_model(config, files):
        raise BadInputError(f"{where}: it is {called}, which tame cannot measure: {reason}; {instead}")
    heads = [
        tensor for tensor in top_tensors or [] if tensor.rpartition(".")[0].endswith(("head", "embed_out", "output"))
    ]
    if top_tensors and not heads and config.get("tie_word_embeddings") is False:
        scores = [tensor for tensor in top_tensors if tensor.startswith(("score.", "v_head.", "classifier."))]
        beside = f" but {scores[0]}, as reward models have" if scores else ""
        raise BadInputError(
            f"{where}: it has no output head (lm_head.weight){beside}, and its config.json says that none is tied "
            f"(tie_word_embeddings: false), so that transformers would make one up for {called}; give a causal language model"
        )


def check_known(config: dict[str, Any], where: str, trust_remote_code: bool) -> None:
    """Check that a model that is only quantized, and not measured, has a class that loads all of it.

    Raises:
        BadInputError: transformers has none, nor has code of the model's own that is trusted.
    """
    _check_whole(config, where)
    if trust_remote_code and isinstance(config.get("auto_map"), dict):
        return
    _check_type(config, where)
    if not is_native(config) and no_language_model(config, ()):
        raise BadInputError(
            f"{where}: transformers {version('transformers')} has no class {called_by(config)}, so that a part of it would be "
            "lost; give a model that it knows"
        )


def no_language_model(config: dict[str, Any], files: Container[str]) -> str | None:
    """What a model is instead of a causal language model, as its config.json and the names of its files say; None for one."""
    if any(file in files for file in EMBEDDING_FILES):
        return "it makes embeddings"
    kind = config.get("model_type")
    reason = _other(kind, _architecture(config)) if isinstance(kind, str) else None
    return ENCODER_DECODER if reason is None and config.get("is_encoder_decoder") is True else reason


def called_by(config: dict[str, Any]) -> str:
    """What people call a model's architecture: its class, or its type where config.json names none."""
    return _architecture(config) or str(config.get("model_type"))


def _check_whole(config: dict[str, Any], where: str) -> None:
    if (kind := config.get("model_type")) in BROKEN:
        called, why = called_by(config), BROKEN[str(kind)]
        raise BadInputError(f"{where}: it is {called}, which tame cannot release: {why}; give another model")


def _check_type(config: dict[str, Any], where: str) -> None:
    if not isinstance(kind := config.get("model_type"), str):
        raise BadInputError(f"{where}: its config.json has no model_type, so that nobody knows what it is; add it")
    if kind not in table(CONFIGS):
        raise BadInputError(
            f"{where}: transformers {version('transformers')} does not know its model_type {kind!r}; give a model that it knows"
        )


def _other(kind: str, name: str | None) -> str | None:
    """What the class `name` of the model type `kind` is for, if it is not a language model."""
    causal = table(CAUSAL).get(kind)
    if name and name == causal:
        return None
    for known, reason in OTHERS.items():
        is_class = table(known).get(kind) == name if name else causal is None and kind in table(known)
        if is_class and known == IMAGES and kind not in NO_TEXT:
            return None
        if is_class and (causal is None or ("IMAGE" not in known and "MULTIMODAL" not in known)):
            return reason
    if causal is None:
        return f"transformers {version('transformers')} has no causal language model of the type {kind}"
    return next((reason for suffix, reason in SUFFIXES.items() if name and name.endswith(suffix)), None)


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


@functools.cache
def table(name: str) -> dict[str, str]:
    """One of transformers' tables, from a model type to the name of a class; empty where this version has none of that name."""
    return _tables(FILES.get(name, FILES[CAUSAL])).get(name, {})


@functools.cache
def _tables(file: str) -> dict[str, dict[str, str]]:
    """All tables of a file in transformers/models/auto: OrderedDicts of pairs, of which the literal ones are kept."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "models" / "auto" / file
    found: dict[str, dict[str, str]] = {}
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and statement.value.args):
            continue
        pairs = statement.value.args[0]
        if isinstance(statement.targets[0], ast.Name) and isinstance(pairs, ast.List):
            literal = [ast.literal_eval(pair) for pair in pairs.elts if _is_pair(pair)]
            found[statement.targets[0].id] = dict(literal)
    return found


def _is_pair(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple) and all(isinstance(item, ast.Constant) for item in node.elts)
