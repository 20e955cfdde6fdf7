"""From texts to the token sequences that codes are chosen on."""

import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from configs.errors import BadInputError, line
from configs.schema import Calibrate, CalibrationSource
from tasks.download.text import CHARACTERS_PER_TOKEN, ROW_SEPARATOR, LoadedText, is_chat, load_text, max_positions

RUN = 50  # words in a row that two texts must not share
AMPLE = 8  # characters a token, with which every part of a text certainly fills a sequence
SECTIONS = 4  # of a text whose last quarters are kept for a fit: few, so that most articles lie in one part alone
Part = Literal["all", "codes", "fit"]
"""What sequences are taken from: all of a text; or three quarters of it, on which codes are chosen, and the last quarter of
each of its sections, on which mixes of them are then measured."""


def load_texts(spec: Calibrate) -> list[LoadedText]:
    """The texts that are mixed: each file is one.

    Raises:
        BadInputError, TameError: as `load_text`.
    """
    files = spec.text.files
    if files is None:
        return [load_text(spec.text)]
    return [load_text(CalibrationSource(files=[file])) for file in files]


def check_apart(texts: list[LoadedText], evaluated: LoadedText) -> None:
    """Check that nothing is calibrated on that is then judged.

    Raises:
        BadInputError: a text has words in a row that the evaluated one has too; it shows them.
    """
    evaluated_runs = _runs(evaluated.text, 1)
    for text in texts:
        if shared := evaluated_runs & _runs(text.text, RUN):
            words = " ".join(min(shared)[:8])
            raise BadInputError(
                f"calibration.text {text.name} overlaps evaluate.text {evaluated.name}: both have “{words} …”; calibrate on "
                "another text, or numbers would flatter the variant"
            )


def _runs(text: str, step: int) -> set[tuple[str, ...]]:
    """Runs of words, one beginning at every `step`-th."""
    words = text.split()
    return {tuple(words[start : start + RUN]) for start in range(0, max(1, len(words) - RUN + 1), step)}


def check_length(spec: Calibrate, folder: Path) -> None:
    """Check that the model takes sequences of that length; `folder` has its config.json.

    Raises:
        BadInputError: the model takes shorter sequences only.
    """
    if (positions := max_positions(folder)) is not None and spec.length > positions:
        raise BadInputError(f"calibration.length {spec.length}: the model takes {positions} tokens at most; lower it")


def make_sequences(
    texts: list[LoadedText], spec: Calibrate, folder: Path, trust_remote_code: bool, out: Path, part: Part = "all"
) -> list[int]:
    """Tokenize a part of the texts and write its sequences, mixed evenly, to `out`/ids.safetensors. Returns how many each gave.

    Each sequence begins as the tokenizer begins a text, with BOS where it adds one.

    Raises:
        BadInputError: no tokenizer, or a text that is shorter than one sequence.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise BadInputError(f"{folder}: no tokenizer that loads ({line(error)}); add its tokenizer files") from None
    start = _start(tokenizer)
    rows_of = functools.partial(_of_text, spec=spec, tokenizer=tokenizer, taken=len(start))
    of = {"all": "", "codes": " (all but what is kept for the fit)", "fit": " (a quarter of it, kept for the fit)"}[
        part
    ]
    found = [rows_of(_part_of(_as_read(text.text, tokenizer), part), name=text.name + of) for text in texts]
    mixed = [start + rows[number] for number in range(max(map(len, found))) for rows in found if number < len(rows)]
    save_file({"ids": torch.tensor(mixed, dtype=torch.int32)}, out / "ids.safetensors")
    return [len(rows) for rows in found]


def _start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return whole[:at]


def _as_read(text: str, tokenizer: Any) -> str:
    """The text, or, where every line of it is a chat in JSON, its chats as the model's template writes them."""
    if not text.startswith('{"'):
        return text
    chats = []
    for row in text.splitlines():
        try:
            chat = json.loads(row)["messages"]
        except (ValueError, KeyError, TypeError):
            return text
        if not is_chat(chat):
            return text
        chats.append(chat)
    if tokenizer.chat_template:
        return "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    return ROW_SEPARATOR.join(str(turn["content"]) for chat in chats for turn in chat)


def _part_of(text: str, part: Part) -> str:
    """What is taken of a text. Cuts are at ends of lines where there are any near."""
    if part == "all":
        return text
    quarters = 4 * SECTIONS
    cuts = [text.rfind("\n", 0, len(text) * at // quarters) + 1 or len(text) * at // quarters for at in range(quarters)]
    pieces = [text[start:end] for start, end in pairwise([*cuts, len(text)])]
    return "".join(piece for number, piece in enumerate(pieces) if (number % 4 == 3) == (part == "fit"))


def _of_text(text: str, spec: Calibrate, tokenizer: Any, taken: int, name: str) -> list[list[int]]:
    """Up to `spec.sequences` rows of tokens, without what begins them, evenly from all over the text."""
    length, count = spec.length - taken, spec.sequences
    if len(text) >= count * length * AMPLE:
        rows = []
        for number in range(count):
            at = len(text) * number // count
            at = 0 if not at else text.find("\n", at) + 1 or at
            piece = text[at : at + length * CHARACTERS_PER_TOKEN]
            rows.append(list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][:length]))
        if all(len(row) == length for row in rows):
            return rows
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole = len(ids) // length
    if not whole:
        raise BadInputError(
            f"calibration.text {name}: {len(ids)} tokens, less than one sequence of {spec.length}; lower calibration.length or "
            "give more text"
        )
    chosen = range(whole) if whole <= count else [number * whole // count for number in range(count)]
    return [ids[number * length : (number + 1) * length] for number in chosen]
