"""Perplexity and divergence against loops that keep all logits, on tiny models of several architectures."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from configs.errors import BadInputError, TameError
from configs.schema import Evaluate, TextSource
from tasks.download.text import load_text
from tests.models import VOCABULARY, tiny, with_own_code

WINDOW, TOKENS = 64, 64 * 9
TEXT = load_text(TextSource(builtin="python-docs")).text


@pytest.fixture(scope="module")
def variants(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama, quantized by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tests.models import tokenizer

    made = {}
    for name, options in {
        "int8": {"load_in_8bit": True},
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    }.items():
        made[name] = tmp_path_factory.mktemp("variants") / name
        model = AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map={"": "cpu"}
        )
        model.save_pretrained(made[name])
        tokenizer().save_pretrained(made[name])
    return made


def spec_of(batch: int = 4, **more) -> Evaluate:
    """How the windows of TEXT are scored."""
    return Evaluate(window=WINDOW, max_tokens=TOKENS, batch_size=batch, **more)


def loaded_of(path: Path):
    from tasks.evaluate.model import load

    return load(path, "cpu")


def score_pair(base: Path, variant: Path | None, folder: Path, batch: int = 4):
    """Score a baseline and, against it, a variant, as the worker does. The results of both."""
    from tasks.evaluate.model import dequantize
    from tasks.evaluate.perplexity import score_baseline, score_variant

    for name in ("base", "variant"):
        (folder / name).mkdir(parents=True)
    score_baseline(loaded_of(base), TEXT, spec_of(batch), folder / "base")
    if variant is not None:
        loaded = loaded_of(variant)
        dequantize(loaded)
        score_variant(loaded, folder / "base", base, batch, folder / "variant")
    return [np.load(folder / name / "windows.npz") for name in ("base", *(["variant"] if variant else []))]


def independent(base: Path, variant: Path) -> dict[str, float]:
    """The same three numbers from stored weights, with every logit in float32 at once."""
    import torch

    logits = []
    for path in (base, variant):
        loaded = loaded_of(path)
        ids = torch.tensor(loaded.tokenizer(TEXT[: TOKENS * 8])["input_ids"][:TOKENS]).view(-1, WINDOW)
        with torch.no_grad():
            logits.append(
                torch.cat([loaded.model(batch).logits.float() for batch in ids.split(4)])[:, :-1].flatten(0, 1)
            )
    before, after = (part.log_softmax(-1) for part in logits)
    return {
        "perplexity": torch.nn.functional.cross_entropy(logits[1], ids[:, 1:].flatten()).exp().item(),
        "kl": torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean().item(),
        "agreement": (before.argmax(-1) == after.argmax(-1)).float().mean().item(),
    }


@pytest.mark.parametrize("name", ["int8", "nf4", "nf4-dq"])
def test_perplexity_divergence_and_agreement_are_those_of_a_plain_loop(
    tiny_llama: Path, variants: dict[str, Path], tmp_path: Path, name: str
) -> None:
    expected = independent(tiny_llama, variants[name])
    _, ours = score_pair(tiny_llama, variants[name], tmp_path)
    assert ours["loss"].shape == (TOKENS // WINDOW, WINDOW - 1)
    assert np.exp(ours["loss"].mean()) == pytest.approx(expected["perplexity"], rel=0.002)
    assert ours["kl"].mean() == pytest.approx(expected["kl"], rel=0.03)
    assert ours["agree"].mean() == pytest.approx(expected["agreement"], abs=0.005)


def test_a_baseline_against_itself_shows_no_difference(tiny_llama: Path, tmp_path: Path) -> None:
    before, after = score_pair(tiny_llama, tiny_llama, tmp_path)
    assert abs(after["kl"]).mean() < 1e-4
    assert after["agree"].mean() > 0.999
    assert np.array_equal(before["loss"], after["loss"])
    floor = json.loads((tmp_path / "base" / "result.json").read_text())["floor"]
    assert (floor["batch_size"], floor["windows"]) == (1, 1)
    assert floor["kl_mean"] < 1e-4
    assert floor["top1_agreement"] > 0.999


def test_what_the_baseline_keeps_is_a_hidden_state_a_token(tiny_llama: Path, tmp_path: Path) -> None:
    score_pair(tiny_llama, None, tmp_path)
    assert (tmp_path / "base" / "hidden.bin").stat().st_size == TOKENS // WINDOW * (WINDOW - 1) * 64 * 2
    others = sum(file.stat().st_size for file in (tmp_path / "base").iterdir() if file.name != "hidden.bin")
    assert others < 24 * TOKENS + 20_000


def test_chunks_and_batches_do_not_change_the_numbers(
    tiny_llama: Path, variants: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = score_pair(tiny_llama, variants["nf4"], tmp_path / "a")
    monkeypatch.setattr("tasks.evaluate.scoring.LOGITS_BYTES", {"cpu": 4 * VOCABULARY * 20})
    _, parts = score_pair(tiny_llama, variants["nf4"], tmp_path / "b", batch=2)
    for name in ("loss", "kl"):
        assert whole[name].mean() == pytest.approx(parts[name].mean(), rel=1e-3)


def architectures() -> dict[str, object]:
    import transformers as t

    small = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    opt = {"word_embed_proj_dim": 32, "ffn_dim": 128, **{k: small[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")}}  # fmt: skip # noqa: E501
    return {
        "gemma2, softcap": t.Gemma2Config(**small, final_logit_softcapping=3.0),
        "cohere, scale": t.CohereConfig(**{k: v for k, v in small.items() if k != "head_dim"}, logit_scale=0.5),
        "granite, divisor": t.GraniteConfig(**{k: v for k, v in small.items() if k != "head_dim"}, logits_scaling=4.0),
        "gpt2, learned positions": t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=0
        ),
        "opt, projection after the backbone": t.OPTConfig(**opt),
        "mamba, asks for its head's dtype": t.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2),
        "recurrent gemma, softcap by another name": t.RecurrentGemmaConfig(
            **{**small, "num_hidden_layers": 3, "num_key_value_heads": 1}, attention_window_size=32, logits_soft_cap=0.5
        ),
        "hyperclovax, factor by the name of a divisor": t.HyperCLOVAXConfig(**small, logits_scaling=0.25),
        "minicpm3, divisor before the head": t.MiniCPM3Config(
            **{**{k: v for k, v in small.items() if k != "head_dim"}, "num_key_value_heads": 4},
            dim_model_base=16,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
        ),
    }


@pytest.mark.parametrize("which", range(9))
def test_heads_that_scale_cap_or_project_give_the_models_own_logits(which: int, tmp_path: Path) -> None:
    import torch

    config = list(architectures().values())[which]
    base = tiny(tmp_path / "base-model", config, "float32")
    other = tiny(tmp_path / "other-model", config, "float32", seed=1)
    expected = independent(base, other)
    _, ours = score_pair(
        base, other, tmp_path
    )  # another model altogether: the baseline's head is read from the baseline
    assert np.exp(ours["loss"].mean()) == pytest.approx(expected["perplexity"], rel=1e-4)
    assert ours["kl"].mean() == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
    assert ours["agree"].mean() == pytest.approx(expected["agreement"], abs=0.005)
    notes = json.loads((tmp_path / "variant" / "result.json").read_text())["notes"]
    assert any("output head differs" in note for note in notes)
    assert torch.get_default_dtype() == torch.float32


def test_a_baseline_with_code_of_its_own_is_read_again_for_its_head(tmp_path: Path) -> None:
    from tasks.evaluate.model import load
    from tasks.evaluate.perplexity import score_baseline, score_variant

    base, other = (with_own_code(tiny(tmp_path / name, seed=seed)) for seed, name in enumerate(("base", "other")))
    folders = [tmp_path / "scores" / name for name in ("base", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    score_baseline(load(base, "cpu", trust_remote_code=True), TEXT, spec_of(4), folders[0])
    variant = load(other, "cpu", trust_remote_code=True)
    score_variant(variant, folders[0], base, 4, folders[1], trust_remote_code=True)
    assert "its output head differs from the baseline's" in variant.notes
    assert np.load(folders[1] / "windows.npz")["kl"].mean() > 0


def test_another_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    import transformers as t

    config = t.AutoConfig.from_pretrained(tiny_llama)
    config.vocab_size = VOCABULARY + 8
    with pytest.raises(BadInputError, match=r"another vocabulary \(512 logits, the model has 520\)"):
        score_pair(tiny_llama, tiny(tmp_path / "larger", config), tmp_path)


def test_logits_that_are_not_finite_are_blamed_on_a_layer(tiny_llama: Path, tmp_path: Path) -> None:
    from tasks.evaluate.perplexity import score_baseline

    loaded = loaded_of(tiny_llama)
    loaded.model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(
        TameError, match=r"not finite at window 0, position 0; .* that of model.layers.1.mlp.down_proj;"
    ):
        score_baseline(loaded, TEXT, spec_of(4), tmp_path)


def test_less_memory_means_smaller_batches(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from tasks.evaluate.perplexity import score_baseline

    loaded = loaded_of(tiny_llama)
    limit = 2

    def short_of_memory(module, arguments) -> None:
        if arguments[0].shape[0] > limit and arguments[0].shape[1] == WINDOW:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    loaded.model.model.embed_tokens.register_forward_pre_hook(short_of_memory)
    with caplog.at_level(logging.INFO, "tame"):
        score_baseline(loaded, TEXT, spec_of(8), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["protocol"]["batch_size"] == 2
    assert "trying 4 at a time (window of 64 tokens)" in caplog.text
    assert "trying 2 at a time" in caplog.text
    limit = 0
    with pytest.raises(TameError, match="no memory for one window of 64 tokens"):
        score_baseline(loaded, TEXT, spec_of(8), tmp_path)


def test_models_that_cannot_be_measured_are_refused_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    import transformers as t

    t.T5Config(vocab_size=VOCABULARY).save_pretrained(tmp_path / "t5")
    with pytest.raises(BadInputError, match="t5 is an encoder-decoder"):
        loaded_of(tmp_path / "t5")
    shutil.copytree(tiny_llama, tmp_path / "mute", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    with pytest.raises(BadInputError, match="no tokenizer that loads") as caught:
        loaded_of(tmp_path / "mute")
    assert "\n" not in str(caught.value)
    shutil.copytree(tiny_llama, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(TameError, match=r"the checkpoint lacks .* \(21 tensors in all\)"):
        loaded_of(tmp_path / "broken")


@pytest.mark.cuda
def test_the_fused_comparison_is_the_plain_one() -> None:
    import torch

    from tasks.evaluate import kl_triton, scoring

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        before = torch.randn(33, 9001, device="cuda", dtype=dtype) * 3
        after, targets = before + torch.randn_like(before) / 5, torch.randint(9001, (33,), device="cuda")
        log_sum = scoring.compare(before, targets)[3]
        for pair in ((before, targets), (after, targets, before, log_sum)):
            for plain, ours in zip(scoring.compare(*pair), kl_triton.compare(*pair), strict=True):
                assert torch.allclose(plain.float(), ours.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_made_in_float32_is_the_16_bit_one(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from tasks.evaluate import cpu_float32

    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    layer = torch.nn.Linear(576, 1024, dtype=kind)
    values = torch.randn(64, 576, dtype=kind)
    own = layer(values)
    monkeypatch.setattr(cpu_float32, "_native", lambda name: False)
    assert cpu_float32.slow(layer.weight)
    assert not cpu_float32.slow(layer.weight.float())
    cpu_float32.widen(torch.nn.Sequential(layer))
    ours = layer(values)
    assert ours.dtype == kind
    assert (ours != own).float().mean() < 0.02  # the order of the sum decides a rounding now and then
    torch.testing.assert_close(ours, own)
