"""The rules of the house hold, and what breaks one is found."""

from pathlib import Path

import pytest

from tests.imports import problems

ROOT = Path(__file__).parent.parent


def test_the_house_keeps_its_rules() -> None:
    assert problems(ROOT) == []


def _house(root: Path, **files: str) -> list[str]:
    for name, source in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return problems(root)


@pytest.mark.parametrize(
    "hidden",
    [
        "from tasks.store import b\n",
        "import tasks.store.b\n",
        "from . import b\n",
        "def f() -> None:\n    from tasks.store.b import x\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tasks.store.b import x\n",
        "try:\n    from tasks.store.b import x\nexcept ImportError:\n    pass\n",
    ],
)
def test_a_circle_is_found_wherever_its_imports_are_hidden(tmp_path: Path, hidden: str) -> None:
    found = _house(
        tmp_path, tasks__store__a=hidden, tasks__store__b="import tasks.store.c\n", tasks__store__c="from .a import y\n"
    )
    assert found == ["circle: tasks.store.a → tasks.store.b → tasks.store.c → tasks.store.a"]


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("tasks__download__task", "from tasks.quantize import layout\n", "tasks.quantize stands above tasks.download"),
        ("tasks__publish__card", "def f():\n    import tasks.report.html\n", "tasks.report stands above tasks.publish"),
        ("tasks__gate", "import flows.release\n", "flows stands above tasks.gate"),
        ("configs__load", "from tasks.gate import gate\n", "tasks.gate stands above configs"),
        ("tasks__runtime__files", "from tasks.store import artifacts\n", "tasks.store stands above tasks.runtime"),
    ],
)
def test_an_import_of_a_room_above_is_found(tmp_path: Path, name: str, source: str, found: str) -> None:
    others = dict.fromkeys(
        ("tasks__quantize__layout", "tasks__report__html", "flows__release", "tasks__gate", "tasks__store__artifacts"),
        "",
    )
    assert [one.partition(", and ")[2] for one in _house(tmp_path, **(others | {name: source}))] == [found]


def test_a_file_that_is_in_no_room_is_found(tmp_path: Path) -> None:
    assert _house(tmp_path, tasks__helpers="") == ["room: tasks.helpers is in no room of tests/imports.py"]


def test_the_library_of_a_format_is_named_by_its_method_alone(tmp_path: Path) -> None:
    house = {"tasks__quantize__methods__nf4": "import bitsandbytes\n", "tasks__gate": '"""As\nBitsAndBytes does."""\n'}
    assert _house(tmp_path, **house) == ["library: tasks.gate line 2 names BitsAndBytes"]


def test_large_files_and_functions_are_found_unless_a_comment_gives_the_reason(tmp_path: Path) -> None:
    wide = "a, b, c, d, e, f, g, h"
    long = "    x = 1\n" * 61
    found = _house(
        tmp_path,
        tasks__gate="x = 1\n" * 351,
        configs__schema="x = 1\n" * 400,
        tasks__store__a=f"class A:\n    def f(self, {wide[:-3]}): ...\n\ndef wide({wide}): ...\n\ndef long():\n{long}",
        tasks__store__b=f"def wide({wide}):  # each is a column of the table\n    ...\ndef long():  # one table\n{long}",
        tasks__store__c=f"def wide({wide}):  # noqa: PLR0913\n    ...\n",
    )
    assert found == [
        "file: tasks.gate has 351 lines, 350 are the most",
        "function: tasks.store.a.long has 62 lines, 60 are the most",
        "parameters: tasks.store.a.wide has 8, 7 are the most",
        "parameters: tasks.store.c.wide has 8, 7 are the most",
    ]
