"""docs/formats.svg, from the table of all methods in RESULTS.md: `python benchmarks/formats_picture.py`.

A row is a variant, ordered by what it loses; a dot is its mean KL from the original on a text, on a logarithmic axis.
"""

import math
from pathlib import Path

HERE = Path(__file__).parent
HEADING = "## All methods on one model"
LEFT, RIGHT, TOP, ROW = 220, 560, 62, 19  # of the axis, and of the rows, in pixels
FROM, TO = 0.002, 0.7  # of the axis, nats a token
COLOURS = {"8 bits": "#5b7f95", "4 bits, rounded or searched": "#c2703d", "4 bits, calibrated": "#2f7d4f"}


def main() -> None:
    """Read the table, and draw it."""
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    found = sorted((row for row in rows if row[0] and row[0] not in ("bf16", "---")), key=lambda row: float(row[2]))
    width, height = 720, TOP + ROW * len(found) + 44
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(16, 22, "SmolLM2-135M in every method: mean KL from the original, nats a token", size=14),
    ]
    left = LEFT - 60
    for name, colour in COLOURS.items():
        out += [f'<circle cx="{left}" cy="40" r="5" fill="{colour}"/>', _text(left + 9, 44, name)]
        left += 50 + 7 * len(name)
    for value in (0.003, 0.01, 0.03, 0.1, 0.3):
        x, end = _place(value), TOP + ROW * len(found)
        out += [
            f'<line x1="{x}" y1="{TOP - 8}" x2="{x}" y2="{end}" stroke="#dddddd"/>',
            _text(x, end + 16, f"{value:g}", "middle"),
        ]
    out += [_text(RIGHT + 70, TOP - 6, "MB", "end"), _text(RIGHT + 140, TOP - 6, "PIQA", "end")]
    for number, row in enumerate(found):
        y = TOP + ROW * number + 12
        colour = list(COLOURS.values())[0 if float(row[1]) > 150 else 2 if "-cal" in row[0] else 1]
        wiki, other = _place(float(row[2])), _place(float(row[3]))
        out += [
            _text(LEFT - 14, y, row[0], "end"),
            f'<line x1="{LEFT}" y1="{y - 4}" x2="{wiki}" y2="{y - 4}" stroke="{colour}" stroke-opacity="0.35"/>',
            f'<circle cx="{wiki}" cy="{y - 4}" r="5" fill="{colour}"/>',
            f'<circle cx="{other}" cy="{y - 4}" r="4" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            _text(RIGHT + 70, y, row[1], "end"),
            _text(RIGHT + 140, y, row[-1].split(",")[0], "end"),
        ]
    out.append(
        _text(
            16,
            height - 8,
            "filled: WikiText-2; open: Python's documentation. PIQA's accuracy is 0.653 in 16 bits, 269 MB.",
            size=11,
        )
    )
    (HERE.parent / "docs" / "formats.svg").write_text("\n".join([*out, "</svg>", ""]), encoding="utf-8")


def _place(value: float) -> float:
    share = math.log(max(value, FROM) / FROM) / math.log(TO / FROM)
    return round(LEFT + share * (RIGHT - LEFT), 1)


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#222222">{text}</text>'


if __name__ == "__main__":
    main()
