"""Tiny random models of any architecture, with a real tokenizer, made in a second."""

import functools
from pathlib import Path
from typing import Any

VOCABULARY = 512


def tiny(folder: Path, config: Any = None, dtype: str = "bfloat16", seed: int = 0, **save: Any) -> Path:
    """Save a random causal LM (a two-layer Llama unless `config` says otherwise) and a tokenizer into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = config or LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
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
