"""Whatever is done to the header of a .safetensors or a .gguf, it is refused in one line, or read as other libraries read it.

`EXAMPLES=10000 pytest --timeout 0 tests/test_damaged_files.py` tries more of them.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import TameError
from tasks.download.checkpoint import read_header
from tasks.download.gguf import GgufHeader, check_gguf, read_gguf
from tests.gguf_files import write

T = TypeVar("T")

many = settings(
    max_examples=int(os.environ.get("EXAMPLES", "300")),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)

TENSORS = {
    "model.embed.weight": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
    "model.norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]},
    "empty": {"dtype": "I64", "shape": [0], "data_offsets": [36, 36]},
    "scalar": {"dtype": "U8", "shape": [], "data_offsets": [36, 37]},
}
WHOLE = {"__metadata__": {"format": "pt"}, **TENSORS}
SIZE = 37


def safetensors(header: bytes, length: int | None = None, data: int = SIZE) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(data)


def as_the_library_reads(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Names, dtypes and shapes as the safetensors library has them; None if it refuses."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in views.items()}
    except SafetensorError:
        return None


def read_or_refused(read: Callable[[], T]) -> T | None:
    """What `read` gives, or None where it refuses in one line."""
    try:
        return read()
    except TameError as error:
        said = str(error)
    assert said.isprintable()
    return None


def judged(path: Path, content: bytes) -> bool:
    """Whether tame reads `content`; if so, the library must read the same of it."""
    path.write_bytes(content)
    found = read_or_refused(lambda: read_header(path, path.name))
    if found is None:
        return False
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found.values()} == as_the_library_reads(path)
    return True


odd = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.lists(st.one_of(st.integers(-3, 40), st.floats(), st.text(max_size=2), st.booleans()), max_size=4),
)  # fmt: skip


@st.composite
def edited_headers(draw: Any) -> bytes:
    """A header of which one entry says something else, in legal JSON."""
    header = json.loads(json.dumps(WHOLE))
    name = draw(st.sampled_from(sorted(header)))
    how = draw(st.sampled_from(("entry", "field", "item", "rename", "remove", "add", "twice")))
    if how == "entry":
        header[name] = draw(odd)
    elif how == "field" and name in TENSORS:
        header[name][draw(st.sampled_from(("dtype", "shape", "data_offsets", "more")))] = draw(odd)
    elif how == "item" and name in TENSORS:
        values = header[name][draw(st.sampled_from(("shape", "data_offsets")))]
        if values:
            values[draw(st.integers(0, len(values) - 1))] = draw(odd)
    elif how == "rename":
        header[draw(st.text(max_size=4))] = header.pop(name)
    elif how == "remove":
        del header[name]
    elif how == "add":
        header[draw(st.text(max_size=4))] = draw(st.sampled_from(sorted(TENSORS.values(), key=str)))
    text = json.dumps(header)
    if how == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(WHOLE[name])}}}'
    return text.encode()


@many
@given(header=edited_headers())
def test_a_safetensors_header_that_says_something_else(tmp_path_factory: pytest.TempPathFactory, header: bytes) -> None:
    judged(tmp_path_factory.getbasetemp() / "edited.safetensors", safetensors(header))


@many
@given(st.data())
def test_a_safetensors_file_with_other_bytes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = safetensors(json.dumps(WHOLE).encode())
    judged(tmp_path_factory.getbasetemp() / "bytes.safetensors", damaged(data, whole, len(whole) - SIZE))


def damaged(data: st.DataObject, whole: bytes, header: int) -> bytes:
    """`whole`, some bytes of its first `header` changed, inserted or cut out, or its end cut off."""
    at = data.draw(st.integers(0, header - 1))
    how = data.draw(st.sampled_from(("change", "insert", "remove", "truncate", "double")))
    some = data.draw(st.binary(min_size=1, max_size=9))
    if how == "change":
        return whole[:at] + some + whole[at + len(some) :]
    if how == "insert":
        return whole[:at] + some + whole[at:]
    if how == "remove":
        return whole[:at] + whole[at + len(some) :]
    if how == "double":
        return whole[: at + len(some)] + whole[at:]
    return whole[: data.draw(st.integers(0, len(whole) - 1))]


@many
@given(length=st.integers(0, (1 << 64) - 1), data=st.integers(0, 200))
def test_a_safetensors_file_whose_lengths_lie(tmp_path_factory: pytest.TempPathFactory, length: int, data: int) -> None:
    header = json.dumps(WHOLE).encode()
    path = tmp_path_factory.getbasetemp() / "lengths.safetensors"
    assert judged(path, safetensors(header, length, data)) == (length == len(header) and data == SIZE)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": {"dtype": "U8", "shape": [37], "data_offsets": [0, 37]}}',
        b'{"a": {"dtype": "U8", "shape": [37.0], "data_offsets": [0, 37]}}',
        b'{"a": {"dtype": "U8", "shape": [37, true], "data_offsets": [false, 37]}}',
        b'{"__metadata__": {"format": 1}, "a": {"dtype": "U8", "shape": [37], "data_offsets": [0, 37]}}',
        b'{"a": {"dtype": "U8", "shape": [-1, -37], "data_offsets": [0, 37]}}',
        b"\xff\xfe{}",
        b"",
    ],
    ids=range(10),
)
def test_a_strange_safetensors_header(tmp_path: Path, header: bytes) -> None:
    assert not judged(tmp_path / "x.safetensors", safetensors(header))


def test_a_whole_safetensors_file_is_read(tmp_path: Path) -> None:
    assert judged(tmp_path / "x.safetensors", safetensors(json.dumps(WHOLE).encode()))


@pytest.fixture(scope="module")
def whole_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "whole.gguf", tiny_llama)


def read_as_gguf(path: Path) -> GgufHeader:
    header = read_gguf(path)
    check_gguf(header)
    return header


@many
@given(st.data())
def test_a_gguf_with_other_bytes(
    whole_gguf: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = read_gguf(whole_gguf)
    content = whole_gguf.read_bytes()
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    begin = min(tensor.start for tensor in whole.tensors.values())
    # The vocabulary is the most of it: damage is done to the counts, the settings and the tensors' entries.
    tokens = whole.entries["tokenizer.ggml.tokens"], whole.entries["tokenizer.ggml.merges"]
    at = data.draw(st.one_of(st.integers(0, tokens[0][0] + 64), st.integers(tokens[1][1] - 64, begin - 1)))
    some = data.draw(
        st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\xff" * 4)))
    )
    how = data.draw(st.sampled_from(("change", "insert", "remove", "truncate")))
    after = {"change": at + len(some), "insert": at, "remove": at + len(some)}.get(how)
    path.write_bytes(
        content[:at] if after is None else content[:at] + (some if how != "remove" else b"") + content[after:]
    )
    found = read_or_refused(lambda: read_as_gguf(path))
    if found is None:
        return
    from gguf import GGUFReader

    known = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert found.tensors.keys() == known.keys()
    for name, tensor in found.tensors.items():
        assert tensor.shape == tuple(int(n) for n in reversed(known[name].shape))
        assert (tensor.kind, tensor.start) == (int(known[name].tensor_type), known[name].data_offset)
        assert tensor.end - tensor.start == known[name].n_bytes
