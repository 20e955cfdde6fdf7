"""What each method loses, and llm-compressor beside it: `python benchmarks/formats.py table|peer …`; the tables are in RESULTS.md.

table  a real model in every method: bytes, KL and agreement with the original, perplexity, and PIQA's items if a file has some
peer   `tame quantize` and llm-compressor's `model_free_ptq`, whole processes: seconds, and whether the tensors are equal
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.schema import Calibrate, CalibrationSource, Source, Variant
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request

VARIANTS: tuple[dict[str, Any], ...] = (
    {"method": "int8"}, {"method": "w8a16"}, {"method": "w8a8"}, {"method": "fp8"}, {"method": "nf4"}, {"method": "w4a16"},
    {"method": "mxfp4"}, {"method": "nvfp4"}, {"method": "w4a16", "scale": "search"}, {"method": "mxfp4", "scale": "search"},
    {"method": "nvfp4", "scale": "search"}, {"method": "w4a16", "calibrate": "fast"}, {"method": "w4a16", "calibrate": True},
    {"method": "nf4", "calibrate": True},
)  # fmt: skip
PRESETS = {
    "w4a16": "W4A16",
    "w8a16": "W8A16",
    "w8a8": "W8A8",
    "fp8": "FP8_DYNAMIC",
    "mxfp4": "MXFP4A16",
    "nvfp4": "NVFP4A16",
}
PEER = """
import sys
from llmcompressor import model_free_ptq
if __name__ == "__main__":
    model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], ignore=["lm_head", "re:.*embed_tokens"], device="cpu")
"""


def table(options: argparse.Namespace) -> None:
    """One line a variant; the original comes first."""
    import torch
    from transformers import AutoTokenizer

    from tasks.calibrate.prepare import calibrate
    from tasks.download.task import download

    torch.set_grad_enabled(False)
    snapshot = download(Source(model=options.source))
    tokenizer = AutoTokenizer.from_pretrained(snapshot.path)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = torch.tensor(ids[: options.tokens // options.window * options.window]).view(-1, options.window)
    items = [json.loads(row) for row in options.piqa.read_text().splitlines()[: options.items]] if options.piqa else []
    model = _loaded(Path(snapshot.path))
    baseline = [_log_probabilities(model, row) for row in windows]
    size = sum(path.stat().st_size for path in Path(snapshot.path).glob("*.safetensors"))
    _say("bf16", size, 0.0, windows, baseline, baseline, _piqa(model, tokenizer, items))
    spec = Calibrate(text=CalibrationSource(builtin="python-library"), sequences=options.sequences, length=512)
    asked = [Variant(**chosen) for chosen in VARIANTS]
    asked = [variant for variant in asked if not options.only or variant.label in options.only]
    made = calibrate(snapshot, spec) if any(variant.calibrate for variant in asked) else None
    for variant in asked:
        with tempfile.TemporaryDirectory() as name:
            request = Request(Path(snapshot.path), Path(name), variant, "cpu", calibration=made)
            started = time.monotonic()
            written = method_of(variant).quantize(request)
            seconds = time.monotonic() - started
            model = _loaded(Path(name), variant)
            found = [_log_probabilities(model, row) for row in windows]
            _say(variant.label, written.weight_bytes, seconds, windows, baseline, found, _piqa(model, tokenizer, items))


def _loaded(folder: Path, variant: Variant | None = None) -> Any:
    """The model with its weights as plain ones where the method allows it, computing in float32."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if variant is not None:
        method_of(variant).densify(model, 1 << 60)
    return model if variant is not None and variant.method == "int8" else model.float()


def _log_probabilities(model: Any, ids: Any) -> Any:
    return model(input_ids=ids[None]).logits[0].float().log_softmax(-1)


def _piqa(model: Any, tokenizer: Any, items: list[dict[str, Any]]) -> float:
    """The share of items whose right ending is the likelier one."""
    right = 0
    for item in items:
        scores = []
        for ending in (item["sol1"], item["sol2"]):
            before = tokenizer(f"Question: {item['goal']}\nAnswer:", add_special_tokens=False)["input_ids"]
            after = tokenizer(f" {ending}", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            import torch

            ids = torch.cat([torch.tensor(before), after])
            found = _log_probabilities(model, ids)[len(before) - 1 : -1]
            scores.append(float(found.gather(1, after[:, None]).sum()))
        right += int(scores[1] > scores[0]) == int(item["label"])
    return right / max(1, len(items))


def _say(
    name: str, size: int, seconds: float, windows: Any, baseline: list[Any], found: list[Any], piqa: float
) -> None:
    pairs = list(zip(baseline, found, strict=True))
    kl = sum(float((one.exp() * (one - other))[:-1].sum(-1).mean()) for one, other in pairs) / len(pairs)
    same = sum(float((one.argmax(-1) == other.argmax(-1))[:-1].float().mean()) for one, other in pairs) / len(pairs)
    losses = [float(-other[:-1].gather(1, row[1:, None]).mean()) for row, other in zip(windows, found, strict=True)]
    perplexity = 2.718281828459045 ** (sum(losses) / len(losses))
    print(
        f"| {name} | {size:,} | {kl:.4f} | {same:.4f} | {perplexity:.3f} | {piqa:.3f} | {seconds:.0f} s |", flush=True
    )


def peer(options: argparse.Namespace) -> None:
    """Both on the same folder, in turn; what each took, and where their tensors differ."""
    for method in options.methods:
        with tempfile.TemporaryDirectory() as name:
            mine, theirs = Path(name) / "tame", Path(name) / "llm-compressor"
            code = Path(name) / "peer.py"
            code.write_text(PEER)
            here = Path(__file__).parent.parent / "tame.py"
            commands = {
                "tame": [sys.executable, str(here), "quantize", options.source, str(mine), "--method", method],
                "llm-compressor": [options.python, str(code), options.source, str(theirs), PRESETS[method]],
            }
            took = {who: _timed(command) for who, command in commands.items()}
            print(f"| {method} | " + " | ".join(f"{who}: {text}" for who, text in took.items()), flush=True)
            print(f"  {_compared(mine, theirs)}", flush=True)


def _timed(command: list[str]) -> str:
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    status = process.wait()
    seconds = time.monotonic() - started
    if status:
        return f"failed: {said.strip().splitlines()[-1] if said.strip() else status}"
    return f"{seconds:.1f} s"  # tame works in a process of its fork server, whose memory is not counted for a parent


def _compared(mine: Path, theirs: Path) -> str:
    import torch
    from safetensors.torch import load_file

    found: list[dict[str, Any]] = [{}, {}]
    for tensors, folder in zip(found, (mine, theirs), strict=True):
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
    names = sorted(found[0].keys() & found[1].keys())
    alone = sorted(found[0].keys() ^ found[1].keys())
    equal = [
        name
        for name in names
        if found[0][name].dtype == found[1][name].dtype
        and found[0][name].shape == found[1][name].shape
        and found[0][name].contiguous().view(torch.uint8).equal(found[1][name].contiguous().view(torch.uint8))
    ]
    other = [name for name in names if name not in set(equal)]
    return (
        f"{len(equal)} of {len(names)} tensors equal; not equal: {other[:3]}; only in one: {alone[:3]} ({len(alone)})"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("table")
    one.add_argument("source")
    one.add_argument("--text", type=Path, required=True, help="what is judged")
    one.add_argument("--piqa", type=Path, help="PIQA's items, JSON a line: goal, sol1, sol2, label")
    one.add_argument("--items", type=int, default=200)
    one.add_argument("--tokens", type=int, default=4096)
    one.add_argument("--window", type=int, default=512)
    one.add_argument("--sequences", type=int, default=64, help="of 512 tokens, for calibrated variants")
    one.add_argument("--only", nargs="+", help="labels of variants")
    one.set_defaults(run=table)
    two = commands.add_parser("peer")
    two.add_argument("source", help="a folder")
    two.add_argument("--python", required=True, help="the Python of an environment with llm-compressor")
    two.add_argument("--methods", nargs="+", default=list(PRESETS), choices=tuple(PRESETS))
    two.set_defaults(run=peer)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
