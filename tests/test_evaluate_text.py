"""Texts, tokens and statistics."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.errors import BadInputError
from configs.schema import TextSource
from tasks.download.text import LoadedText, check_text, load_text
from tasks.evaluate.comparison import _diverges_at
from tasks.evaluate.statistics import interval, mcnemar
from tests.hub import Hub
from tests.models import tiny, with_own_code, zoo


def test_files_are_joined_by_a_blank_line_and_keyed_by_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfzw\xc3\xb6lf")  # a byte-order mark is no text
    text = load_text(TextSource(files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))
    assert text.text == "one\n\nzwölf"
    assert text.name == "a.txt + b.txt"
    (tmp_path / "c.txt").write_text("one\n\nzwölf", encoding="utf-8")
    assert load_text(TextSource(files=[str(tmp_path / "c.txt")])).digest == text.digest
    (tmp_path / "c.txt").write_text("one\n\nzwolf", encoding="utf-8")
    assert load_text(TextSource(files=[str(tmp_path / "c.txt")])).digest != text.digest


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"good \xff bad", "byte 0xff at offset 5 is not UTF-8"), (b" \n", "no text in it"), (None, "No such file")],
)
def test_a_file_that_is_no_text_is_named_with_what_is_wrong(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInputError, match="corpus") as caught:
        load_text(TextSource(files=[str(path)]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_builtin_text_is_there_without_a_network() -> None:
    text = load_text(TextSource(builtin="python-docs"))
    assert len(text.text) > 300_000
    assert text.digest == load_text(TextSource(builtin="python-docs")).digest


def test_check_text_counts_and_refuses(tiny_llama: Path, tmp_path: Path) -> None:
    def loaded(text: str) -> LoadedText:
        return LoadedText(text=text, name="mine", digest="", revision=None)

    assert check_text(load_text(TextSource(builtin="python-docs")), 64, tiny_llama) >= 64
    with pytest.raises(BadInputError, match=r"mine: \d+ tokens, less than one window of 64"):
        check_text(loaded("a few words"), 64, tiny_llama)
    with pytest.raises(BadInputError, match="512 tokens at most"):
        check_text(loaded("word " * 5000), 1024, tiny_llama)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInputError, match="not a tokenizer"):
        check_text(loaded("word"), 2, tmp_path)


def test_a_tokenizer_that_is_code_is_counted_with_where_it_is_trusted(tmp_path: Path) -> None:
    folder = with_own_code(tiny(tmp_path / "own"))
    text = LoadedText(text="zwölf", name="mine", digest="", revision=None)
    assert check_text(text, 6, folder, trust_remote_code=True) == 6  # a byte each
    with pytest.raises(BadInputError, match="no tokenizer that loads"):
        check_text(text, 6, folder)


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar(9, 1) == mcnemar(1, 9)
    exact = 2 * sum(math.comb(999, k) for k in range(451)) / 2**999
    assert mcnemar(450, 549) == pytest.approx(exact)
    assert mcnemar(450, 550) == pytest.approx(exact, rel=0.1)  # where the normal approximation takes over


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        values = draws.normal(3.0, 1.0, 40)
        low, high = interval(values, float(values.mean()), seed) or (0, 0)
        assert low <= values.mean() <= high
        covered += low <= 3.0 <= high
    assert 86 <= covered <= 99
    assert interval(np.ones(1), 1.0, 0) is None
    skewed = np.array([0.0, 0, 0, 100])
    low, high = interval(skewed, 25.0, 0) or (0, 0)
    assert low <= 25 <= high
    assert interval(skewed, 25.0, 7) == interval(skewed, 25.0, 7)


@pytest.mark.parametrize(
    ("before", "after", "at"), [("abc", "abc", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "x", 0)]
)
def test_first_divergence(before: str, after: str, at: int | None) -> None:
    assert _diverges_at(before, after) == at


READ = """
import sys
from configs.schema import TextSource
from tasks.download.text import load_text
for asked in sys.argv[1:]:
    try:
        print(repr(load_text(TextSource.model_validate_json(asked)).text))
    except Exception as error:
        print(error)
"""


def read_from(hub: Hub, home: Path, *sources: TextSource) -> list[str]:
    """What each text is, or why there is none: in a process of its own, as `datasets` reads the Hub's address at import."""
    there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token(), "HF_HOME": str(home), "TAME_HOME": str(home)}
    command = [sys.executable, "-c", READ, *(source.model_dump_json() for source in sources)]
    done = subprocess.run(command, env={**os.environ, **there}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A data set with two splits and a row without text."""
    folder = tmp_path / "data-set"
    folder.mkdir()
    card = {"configs": [{"config_name": "plain", "data_files": [
        {"split": "train", "path": "train.jsonl"}, {"split": "test", "path": "test.jsonl"}]}]}  # fmt: skip
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    rows = [{"text": "one", "number": 1}, {"text": None, "number": 2}, {"text": "two", "number": 3}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text(json.dumps({"text": "large", "number": 1}) + "\n")
    return folder


def test_only_the_files_of_the_split_are_fetched_and_null_rows_are_left_out(data_set: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add_dataset("me/text", data_set)
        assert read_from(hub, tmp_path / "home", TextSource(dataset="me/text", config="plain")) == [r"'one\n\ntwo'"]
        assert any("test.jsonl" in request for request in hub.requests)
        assert not any("resolve" in request and "train.jsonl" in request for request in hub.requests)
        sliced = TextSource(dataset="me/text", config="plain", split="test[2:]+train")
        assert read_from(hub, tmp_path / "home", sliced) == [r"'two\n\nlarge'"]


def test_a_split_or_column_that_is_not_there_is_named(data_set: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        hub.add_dataset("me/text", data_set)
        asked = (
            TextSource(dataset="me/text", **one)
            for one in ({"split": "dev"}, {"column": "words"}, {"column": "number"})
        )
        split, words, number = read_from(hub, tmp_path / "home", *asked)
        assert 'Unknown split "dev"' in split
        assert "no column 'words'; it has text, number" in words
        assert "column 'number' holds int, not text" in number


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mamba"])
def test_a_source_without_a_tokenizer_is_refused(name: str, tmp_path: Path) -> None:
    from tasks.evaluate.model import load

    folder = tiny(tmp_path / "model", zoo(name))
    assert check_text(load_text(TextSource(builtin="python-docs")), 64, folder) >= 64
    for path in [*folder.glob("tokenizer*"), *folder.glob("special_tokens*")]:
        path.unlink()
    with pytest.raises(BadInputError, match=r"no tokenizer"):
        check_text(load_text(TextSource(builtin="python-docs")), 64, folder)
    with pytest.raises(BadInputError, match=r"no tokenizer"):
        load(folder, "cpu")
