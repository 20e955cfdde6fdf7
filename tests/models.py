"""Tiny random models of any architecture, with a real tokenizer, made in a second."""

import functools
import json
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.quantize.methods import method_of, method_of_source
from tasks.quantize.protocols import Request, Written
from tasks.runtime.progress import Progress, silent

VOCABULARY = 512

_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **_IDS,
}
_LLAMA = {**_BASE, "num_key_value_heads": 2}
_HEADS = {**_LLAMA, "head_dim": 16}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
_ENCODER_DECODER = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128,
}  # fmt: skip

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "odd": ("LlamaConfig", {**_BASE, "hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", _HEADS),
    "qwen3-tied": ("Qwen3Config", {**_HEADS, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", _LLAMA),
    "gemma2": ("Gemma2Config", _HEADS),
    "gemma3": ("Gemma3TextConfig", _HEADS),
    "phi": ("PhiConfig", _BASE),
    "phi3": ("Phi3Config", _LLAMA),
    "olmo2": ("Olmo2Config", _LLAMA),
    "stablelm": ("StableLmConfig", _LLAMA),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, **_IDS}),
    "gpt-neox": ("GPTNeoXConfig", _BASE),
    "opt": ("OPTConfig", {**_BASE, "ffn_dim": 128, "word_embed_proj_dim": 32}),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}),
    "mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_HEADS, **_MOE}),
    "granite-moe": ("GraniteMoeConfig", {**_LLAMA, "num_local_experts": 4}),
    "gpt-oss": (
        "GptOssConfig",
        {**_HEADS, "num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_BASE, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 2,
            "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        },
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            **_HEADS, "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **_HEADS, **_MOE, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4,
            "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "t5": (
        "T5Config",
        {
            "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartConfig", _ENCODER_DECODER),
    "whisper": ("WhisperConfig", {**_ENCODER_DECODER, **_IDS, "max_target_positions": 64, "max_source_positions": 64}),
    "llava": (
        "LlavaConfig",
        {
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "text_config": {**_LLAMA, "model_type": "llama"},
            "image_token_index": 5,
        },
    ),
    "gemma3-vision": ("Gemma3Config", {"vision_config": _VISION, "text_config": _HEADS}),
    "qwen2-vl": (
        "Qwen2VLConfig",
        {
            "text_config": {
                **_LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            },
            "vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2},
        },
    ),
}  # fmt: skip
NOT_QUANTIZED = (
    "FalconConfig",
    {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)

LOOK = '{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "vocab_size": 512}'
"""The config.json of a model that is only looked at."""


def weights(value: int) -> bytes:
    """A safetensors file with one number in it."""
    header = b'{"lm_head.weight":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + value.to_bytes(4, "little")


def zoo(name: str) -> Any:
    """The config of one of the architectures in `ZOO`."""
    import transformers

    kind, values = ZOO[name]
    return getattr(transformers, kind)(**values)


def tiny(
    folder: Path, config: Any = None, dtype: str = "bfloat16", seed: int = 0, spread: bool = False, **save: Any
) -> Path:
    """Save a random model (a two-layer Llama unless `config` says otherwise) and a tokenizer into `folder`.

    `spread` makes norms and biases, which start as ones and zeros, random too.
    """
    import torch
    import transformers
    from transformers import LlamaConfig

    config = config or LlamaConfig(**_LLAMA)
    autos = ("CausalLM", "Seq2SeqLM", "ImageTextToText", "SpeechSeq2Seq")
    auto = next(
        auto
        for kind in autos
        if type(config) in (auto := getattr(transformers, f"AutoModelFor{kind}"))._model_mapping.keys()  # noqa: SIM118
    )
    torch.manual_seed(seed)
    model = auto.from_config(config, dtype=getattr(torch, dtype))
    if spread:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
    return folder


MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER_CODE = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    model_input_names = ["input_ids", "attention_mask"]
    vocab_size = 256

    def get_vocab(self):
        return {chr(code): code for code in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return bytes(map(ord, tokens)).decode(errors="replace")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()
"""


def with_own_code(folder: Path) -> Path:
    """Make of the tiny Llama in `folder` a model whose architecture and tokenizer are code in its own folder."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_model.py").write_text(MODEL_CODE)
    (folder / "tokenizer.json").unlink()
    (folder / "own_tokenizer.py").write_text(TOKENIZER_CODE)
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, "eos_token": "\x00"}))
    return folder


@functools.cache
def tokenizer() -> Any:
    """A byte-level BPE of 512 tokens, trained on the prose inside CPython."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([topics[key] for key in sorted(topics)][:40], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>", model_max_length=512
    )


def quantize(source: Path, out: Path, variant: Variant, progress: Progress = silent, **options: Any) -> Written:
    """Quantize in this process, on the CPU unless told otherwise."""
    out.mkdir(exist_ok=True)
    request = Request(source, out, variant, **{"device": "cpu", "source_method": method_of_source(source), **options})
    return method_of(variant).quantize(request, progress)
