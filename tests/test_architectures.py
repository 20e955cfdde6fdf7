"""What a model is, from its config.json and names alone, as transformers' own tables have it."""

from typing import Any

import pytest

from configs.errors import BadInputError
from tasks.download.architectures import CAUSAL, CONFIGS, HEADLESS, OTHERS, check_language_model, is_native, table


def check(
    config: dict[str, Any], files: tuple[str, ...] = (), tensors: list[str] | None = None, **options: Any
) -> None:
    sizes = dict.fromkeys(("config.json", *files), 1)
    check_language_model(config, sizes, tensors, "source.model org/model", options.get("trust_remote_code", False))


def config(kind: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **({"architectures": [name]} if name else {}), **more}


def test_the_tables_are_those_of_transformers() -> None:
    from transformers.models.auto import auto_mappings, modeling_auto

    for name in (CAUSAL, HEADLESS, *OTHERS):
        known = {kind: cls for kind, cls in getattr(modeling_auto, name).items() if isinstance(cls, str)}
        read = table(name)
        assert read.items() <= known.items(), name
        if "MULTIMODAL" not in name:  # which begins with all of another table
            assert read == known, name
        assert read
    assert table(CONFIGS).items() <= auto_mappings.CONFIG_MAPPING_NAMES.items()
    assert len(table(CONFIGS)) > 300


@pytest.mark.parametrize(
    "good",
    [
        config("llama", "LlamaForCausalLM"),
        config("llama"),
        config("llama", "LLaMAForCausalLM"),  # as it was called in 2023; transformers goes by the type
        config("gpt2", "GPT2LMHeadModel"),
        config("qwen3_moe", "Qwen3MoeForCausalLM", tie_word_embeddings=True),
        config("mamba", "MambaForCausalLM"),
        config("llava", "LlavaForConditionalGeneration"),
        config("qwen2_vl"),
        config("phi3", "Phi3ForCausalLM", auto_map={"AutoConfig": "x.y"}),
        config("gemma3", "Gemma3ForConditionalGeneration"),  # its language model is measured
        config("qwen3_5", "Qwen3_5ForConditionalGeneration"),
        config("bart", "BartForCausalLM"),
    ],
    ids=str,
)
def test_a_language_model_passes(good: dict[str, Any]) -> None:
    check(good)
    assert is_native(good) == (good.get("architectures") != ["LLaMAForCausalLM"])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (config("blip-2", "Blip2ForConditionalGeneration"), "it writes text of images alone"),
        (config("qwen2_audio", "Qwen2AudioForConditionalGeneration"), "it reads sound or images beside text"),
        (config("whisper", "WhisperForConditionalGeneration"), "it turns speech into text"),
        (config("t5", "T5ForConditionalGeneration"), "an encoder-decoder"),
        (config("bart", "BartForConditionalGeneration"), "an encoder-decoder"),
        (config("bart", is_encoder_decoder=True), "an encoder-decoder"),
        (config("llama", "LlamaForSequenceClassification"), "it gives scores, as reward models do"),
        (config("qwen2", "Qwen2ForProcessRewardModel"), "it gives scores, as reward models do"),
        (config("llama", "LlamaForTokenClassification"), "it labels tokens"),
        (config("qwen3", "Qwen3Model"), "it has no output head, as embedding models"),
        (config("bert", "BertForMaskedLM"), "it fills gaps in a text"),
        (config("clip", "CLIPModel"), "no causal language model of the type clip"),
        (config("llama4", "Llama4ForConditionalGeneration"), "does not quantize them again"),
        (config("llama4_text", "Llama4ForCausalLM"), "does not quantize them again"),
        (config("own", "OwnForCausalLM"), "does not know its model_type 'own'"),
        ({"architectures": ["LlamaForCausalLM"]}, "no model_type"),
    ],
    ids=str,
)
def test_what_is_none_is_refused_by_its_name(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInputError, match="org/model") as error:
        check(bad)
    assert said in str(error.value)
    if name := bad.get("architectures"):
        assert name[0] in str(error.value) or "model_type" in said


def test_an_embedding_model_says_so_by_its_files() -> None:
    with pytest.raises(BadInputError, match=r"embeddings \(modules.json"):
        check(config("qwen3", "Qwen3ForCausalLM"), files=("modules.json",))


def test_an_output_head_must_be_there_or_tied() -> None:
    untied = config("llama", "LlamaForCausalLM", tie_word_embeddings=False)
    check(untied, tensors=["lm_head.weight", "model.embed_tokens.weight"])
    check(config("gpt_neox", "GPTNeoXForCausalLM", tie_word_embeddings=False), tensors=["embed_out.weight"])
    check({**untied, "tie_word_embeddings": True}, tensors=["model.embed_tokens.weight"])
    with pytest.raises(BadInputError, match=r"no output head \(lm_head.weight\) but score.weight"):
        check(untied, tensors=["model.embed_tokens.weight", "score.weight"])
    with pytest.raises(BadInputError, match=r"no output head \(lm_head.weight\), and"):
        check(untied, tensors=["model.embed_tokens.weight", "model.norm.weight"])


def test_own_code_that_is_trusted_says_itself_what_it_is() -> None:
    own = config("own", "OwnForCausalLM", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    check(own, trust_remote_code=True)
    assert not is_native(own)
