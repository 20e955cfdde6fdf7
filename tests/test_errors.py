"""The tree of exceptions, and what an error may say of an address."""

import ast
import pickle
import re
from pathlib import Path

import pytest

from configs import errors
from configs.errors import BadInputError, TameError, bare_address, line, named_line, without_credentials


@pytest.mark.parametrize(
    "password", ["secret", "sec@ret", "sec/ret", "s@ec/r@et", "sec?ret", "sec#ret", "sec:ret", "1/sec@ret", "[sec]ret"]
)
def test_no_part_of_a_password_is_printed(password: str) -> None:
    for address in (f"postgresql://ann:{password}@db.example:5432/mlflow", f"http://ann:{password}@db.example:5000"):
        for said in (
            bare_address(address),
            without_credentials(f"no answer from '{address}' (try again)"),
            named_line(OSError(f"{address} is away")),
        ):
            assert "db.example" in said
            assert not [part for part in ("ann", "sec", "ret") if part in said]


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1",
        "sqlite:////home/me/mlflow.db",
        "sqlite:///C:/me@home/mlflow.db",
        "http://[::1]:5000/health",
        "https://hub.example/me/tiny@main",
        "me@example.org wrote http://example.org",
        "s3://bucket/a@b",
    ],
)
def test_an_address_without_credentials_is_left_as_it_is(text: str) -> None:
    assert without_credentials(text) == text


def test_secrets_in_a_query_are_not_printed() -> None:
    said = line(OSError("https://cdn.example/x?X-Amz-Signature=abc&part=1 and postgresql://db/m?user=ann&password=abc"))
    assert said == "https://cdn.example/x?X-Amz-Signature=…&part=1 and postgresql://db/m?user=ann&password=…"


def test_the_tree_in_the_docstring_names_every_exception_below_its_parent() -> None:
    drawn: list[tuple[int, str]] = []
    for text in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([│├└─ ]*)(\w+Error) ", text):
            drawn.append((len(found[1]), found[2]))
    parents = {}
    for place, (depth, name) in enumerate(drawn):
        above = [other for other_depth, other in drawn[:place] if other_depth < depth]
        parents[name] = above[-1] if above else "Exception"
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert parents == {name: kind.__bases__[0].__name__ for name, kind in classes.items()}


def test_no_other_file_defines_an_exception() -> None:
    root = Path(errors.__file__).parent.parent
    known = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    known |= {"Exception", "BaseException", "OSError", "ValueError", "RuntimeError"}
    files = [
        root / "tame.py",
        *(path for part in ("configs", "flows", "infra", "tasks") for path in (root / part).rglob("*.py")),
    ]
    elsewhere = [
        f"{path}: {node.name}"
        for path in files
        if path != Path(errors.__file__)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & known
    ]
    assert elsewhere == []


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_every_exception_crosses_a_process_with_its_text_and_exit_code(kind: type[TameError]) -> None:
    error = kind("what, where, what to do")
    error.__dict__["after"] = 3.0
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.__dict__["after"]) == ("what, where, what to do", 3.0)
    assert copy.exit_code == (2 if issubclass(kind, BadInputError) else 1)


def test_an_error_is_one_line_and_only_a_foreign_one_is_named_by_its_class() -> None:
    assert line(OSError("first\n  second\tthird")) == "first second third"
    assert named_line(KeyError("x")) == "KeyError: 'x'"
    assert named_line(TimeoutError()) == "TimeoutError"
    assert named_line(TameError("model x: gone;\n look")) == "model x: gone; look"
    assert (len(line("a" * 1000)), len(line("a" * 1000, limit=None))) == (300, 1000)
