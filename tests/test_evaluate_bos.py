"""Windows that begin with BOS, where the tokenizer puts one before a text."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import BadInputError
from configs.schema import Evaluate, TextSource
from tasks.download.text import load_text
from tasks.download.tokenizer_files import check_bos
from tasks.evaluate.model import Loaded, load
from tasks.evaluate.perplexity import beginning, cut_text, score_alone
from tests.models import tiny, tokenizer, zoo

WINDOW, COUNT, BOS = 64, 6, 1
TEXT = load_text(TextSource(builtin="python-docs")).text[:20_000]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A tiny Gemma in float32 whose tokenizer puts token 1 before a text, as Gemma's puts <bos>."""
    folder = tiny(tmp_path_factory.mktemp("models") / "gemma", zoo("gemma2"), "float32", spread=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    name = tokenizer().convert_ids_to_tokens(BOS)
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [BOS], "tokens": [name]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": name}))
    return load(folder, "cpu")


def spec_of(bos: str) -> Evaluate:
    return Evaluate(window=WINDOW, max_tokens=WINDOW * COUNT, batch_size=4, bos=bos)


def measured(loaded: Loaded, folder: Path, bos: str) -> tuple[float, str]:
    """Perplexity, and what the protocol says of special tokens."""
    folder.mkdir()
    score_alone(loaded, TEXT, spec_of(bos), folder)
    said = json.loads((folder / "result.json").read_text())["protocol"]["special_tokens"]
    return float(np.exp(np.load(folder / "windows.npz")["loss"].mean())), str(said)


def independent(loaded: Loaded, windows: list[list[int]]) -> float:
    """Perplexity of windows by a loop over all logits."""
    import torch

    losses = []
    for ids in windows:
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = loaded.model(tokens).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))
    return float(torch.stack(losses).mean().exp())


def test_perplexity_with_bos_in_each_window_is_that_of_a_plain_loop(gemma: Loaded, tmp_path: Path) -> None:
    assert beginning(gemma.tokenizer) == [BOS]
    bare = gemma.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    room = WINDOW - 1
    each = [[BOS, *bare[i * room : (i + 1) * room]] for i in range(COUNT)]
    once = [([BOS, *bare])[i * WINDOW : (i + 1) * WINDOW] for i in range(COUNT)]
    none = [bare[i * WINDOW : (i + 1) * WINDOW] for i in range(COUNT)]
    name = gemma.tokenizer.decode([BOS])
    for bos, windows, said in (
        ("auto", each, f"{name} before each window"),
        ("always", each, f"{name} before each window"),
        ("once", once, f"{name} once, before the text"),
        ("never", none, "none"),
    ):
        assert measured(gemma, tmp_path / bos, bos) == (pytest.approx(independent(gemma, windows), rel=1e-6), said)


def test_a_tokenizer_that_adds_no_bos_gives_the_windows_of_before(tiny_llama: Path) -> None:
    plain = tokenizer()
    assert beginning(plain) == []
    auto, once = (cut_text(TEXT, plain, spec_of(bos)) for bos in ("auto", "once"))
    assert (auto.tokens == once.tokens).all()
    assert auto.tokens.flatten().tolist() == plain(TEXT)["input_ids"][: WINDOW * COUNT]
    always = cut_text(TEXT, plain, spec_of("always"))
    assert set(always.tokens[:, 0]) == {plain.bos_token_id}
    check_bos(tiny_llama, "always")


def test_always_needs_a_bos_token(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(BadInputError, match=r"evaluate.bos always: the model's tokenizer has no BOS token; say auto"):
        check_bos(tmp_path, "always")
