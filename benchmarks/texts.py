"""The texts of the tables in RESULTS.md: `python benchmarks/texts.py DATA OUT`.

DATA has `wikitext2-test.txt` (WikiText-2's test split) and `piqa-valid-600.jsonl`. OUT gets what is calibrated on (wiki.txt, the
last 300 kB of WikiText-2's test split; lib.txt, docstrings of Python's standard library) and what is judged (wikitext.txt, its
beginning; documentation.txt, Python's `pydoc_data`; piqa.txt; source.txt, code of `argparse` and `asyncio`).
"""

import ast
import json
import sys
import sysconfig
from pathlib import Path

TAIL = 300_000  # bytes
LIBRARY = 1_000_000  # characters of docstrings


def main() -> None:
    """Write them."""
    data, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    raw = (data / "wikitext2-test.txt").read_bytes()
    wiki = raw[-TAIL:]
    rows = [json.loads(row) for row in (data / "piqa-valid-600.jsonl").read_text(encoding="utf-8").splitlines()]
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    code = [library / "argparse.py", *sorted((library / "asyncio").glob("*.py"))]
    texts = {
        "wiki": wiki[wiki.index(b"\n") + 1 :].decode(),
        "lib": "\n\n".join(docstrings(library, {"pydoc_data", "test", "site-packages", "asyncio", "argparse.py"}))[
            :LIBRARY
        ],
        "wikitext": raw[:-TAIL].decode(errors="ignore"),
        "documentation": "\n\n".join(topics[key] for key in sorted(topics)),
        "piqa": "\n\n".join(
            f"Question: {row['goal']}\nAnswer: {row['sol1' if row['label'] == 0 else 'sol2']}" for row in rows
        ),
        "source": "\n\n".join(path.read_text(encoding="utf-8") for path in code),
    }
    for name, text in texts.items():
        (out / f"{name}.txt").write_text(text, encoding="utf-8")
        print(name, len(text))


def docstrings(library: Path, without: set[str]) -> list[str]:
    """Those of modules, classes and functions, in the order of their files' names."""
    found = []
    for path in sorted(library.rglob("*.py")):
        if without & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [text for text in texts if text and len(text) > 200]
    return found


if __name__ == "__main__":
    main()
