"""What each method loses, and llm-compressor beside it: `python benchmarks/formats.py table|peer …`; the tables are in RESULTS.md.

table  a real model in every method, and others' checkpoints: MB; KL, agreement with the original and perplexity on each text;
       accuracy on PIQA's items, if a file has some: all by tame's own evaluation
peer   `tame quantize` and llm-compressor's `model_free_ptq`, whole processes: seconds, and whether the tensors are equal
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.schema import Calibrate, CalibrationSource, Evaluate, Source, TextSource, Variant
from tasks.download.text import load_text
from tasks.evaluate.comparison import assemble
from tasks.evaluate.lm_eval_index import TaskWork
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request

sys.path.insert(0, str(Path(__file__).parent.parent))

VARIANTS: tuple[dict[str, Any], ...] = (
    {"method": "int8"}, {"method": "w8a16"}, {"method": "w8a8"}, {"method": "fp8"}, {"method": "fp8-block"}, {"method": "nf4"},
    {"method": "nf4", "double_quant": True}, {"method": "fp4"}, {"method": "w4a16", "group_size": 64},
    {"method": "w4a16", "group_size": 32}, {"method": "mxfp4"}, {"method": "nvfp4"},
    {"method": "w4a16", "group_size": 64, "scale": "search"}, {"method": "w4a16", "group_size": 32, "scale": "search"},
    {"method": "mxfp4", "scale": "search"}, {"method": "nvfp4", "scale": "search"},
    {"method": "nf4", "calibrate": "fast"}, {"method": "fp4", "calibrate": "fast"},
    {"method": "w4a16", "group_size": 64, "calibrate": "fast"}, {"method": "nf4", "calibrate": True},
    {"method": "nf4", "double_quant": True, "calibrate": True}, {"method": "fp4", "calibrate": True},
    {"method": "w4a16", "group_size": 64, "calibrate": True}, {"method": "w4a16", "group_size": 32, "calibrate": True},
    {"method": "nf4", "calibrate": "best"}, {"method": "w4a16", "group_size": 64, "calibrate": "best"},
    {"method": "w4a16", "group_size": 32, "calibrate": "best"},
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
    model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], ignore=["lm_head", "re:.*embed_tokens"], device=sys.argv[4])
"""


class Judge:
    """A model and texts that others are compared on, by tame's own evaluation; PIQA's items too, if a file has some."""

    def __init__(self, source: Path, options: argparse.Namespace, work: Path) -> None:
        self.source, self.device, self.work = source, options.device, work
        self.texts: dict[str, str] = {}
        self.specs: dict[str, Evaluate] = {}
        for name in options.text:
            text = TextSource(builtin="python-docs") if name == "python-docs" else TextSource(files=[name])
            label = Path(name).stem
            self.texts[label] = load_text(text).text
            asked = ["piqa_own"] if options.piqa and not self.specs else []
            self.specs[label] = Evaluate(
                text=text, window=options.window, max_tokens=options.tokens, chat="never", tasks=asked
            )
        if options.piqa:
            from benchmarks.piqa import write_task

            (work / "tasks").mkdir()
            write_task(options.piqa, options.items, work / "tasks")
        self.baseline: dict[str, dict[str, Path]] = {}
        self.original = self.measured("bf16", source)

    def measured(self, label: str, folder: Path) -> dict[str, dict[str, float]]:
        """The metrics of a checkpoint, by text; the first call's is the baseline."""
        from tasks.evaluate.cpu_float32 import widen
        from tasks.evaluate.lm_eval_run import run_tasks
        from tasks.evaluate.model import dequantize, load
        from tasks.evaluate.perplexity import score_baseline, score_variant

        loaded = load(folder, self.device)
        loaded.tokenizer.chat_template = None
        dequantize(loaded)
        widen(loaded.model)
        first, found = not self.baseline, {}
        for text, spec in self.specs.items():
            place = self.work / label / text
            parts = {"scores": place / "scores", **{f"tasks/{name}": place / name for name in spec.tasks}}
            for part in (*parts.values(), place / "metrics"):
                part.mkdir(parents=True)
            if first:
                score_baseline(loaded, self.texts[text], spec, parts["scores"])
            else:
                known = self.baseline[text]["scores"]
                score_variant(loaded, known, self.source, spec.batch_size, parts["scores"])
            for name in spec.tasks:
                work = TaskWork(names=[name], include=[str(self.work / "tasks")])
                run_tasks(loaded, work, spec, parts[f"tasks/{name}"], floor=first)
            assemble(parts, None if first else self.baseline[text], {}, spec, {}, place / "metrics")
            found[text] = json.loads((place / "metrics" / "evaluation.json").read_bytes())["metrics"]
            if first:
                self.baseline[text] = parts
        return found


def table(options: argparse.Namespace) -> None:
    """One line a variant; the original comes first, checkpoints that others made last."""
    from tasks.calibrate.task import calibrate
    from tasks.download.task import download

    snapshot = download(Source(model=options.source))
    source = Path(snapshot.path)
    asked = [Variant(**chosen) for chosen in VARIANTS]
    asked = [variant for variant in asked if options.only is None or variant.label in options.only]
    made = None
    if any(variant.calibrate for variant in asked):
        text = CalibrationSource(
            files=options.calibrate or None, builtin=None if options.calibrate else "python-library"
        )
        made = calibrate(snapshot, Calibrate(text=text, sequences=options.sequences, length=512))
        print(f"model: {source}  sequences: {made.path}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        judge = Judge(source, options, work)
        _say(options, "bf16", source, 0.0, judge.original)
        for variant in asked:
            out = work / "checkpoint"
            out.mkdir()
            started = time.monotonic()
            method_of(variant).quantize(Request(source, out, variant, options.device, calibration=made))
            seconds = time.monotonic() - started
            for file in source.iterdir():
                if file.name.startswith(("tokenizer", "special", "vocab", "merges")):
                    shutil.copy(file, out)
            _say(options, variant.label, out, seconds, judge.measured(variant.label, out))
            shutil.rmtree(out)
        for folder in options.checkpoint:
            _say(options, folder.name, folder, 0.0, judge.measured(folder.name, folder))


def _say(
    options: argparse.Namespace, name: str, folder: Path, seconds: float, found: dict[str, dict[str, float]]
) -> None:
    """Print a row of the table, and add it to the file of JSON lines."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cells = [name, f"{size / 1e6:.1f}"]
    for metrics in found.values():
        cells += [
            f"{metrics.get('kl_mean', 0):.4f}",
            f"{metrics.get('top1_agreement', 1):.4f}",
            f"{metrics['perplexity']:.3f}",
        ]
    tasks = next(iter(found.values()))
    if "task/piqa_own/acc" in tasks:
        cells.append(f"{tasks['task/piqa_own/acc']:.3f} ({tasks.get('task/piqa_own/flips', 0):.0f} flips)")
    print("| " + " | ".join([*cells, f"{seconds:.1f}"]) + " |", flush=True)
    if options.json:
        row = {"variant": name, "bytes": size, "seconds": seconds, "metrics": found}
        with options.json.open("a") as file:
            file.write(json.dumps(row) + "\n")


def peer(options: argparse.Namespace) -> None:
    """Both on the same folder, in turn; what each took, and where their tensors differ."""
    for method in options.methods:
        with tempfile.TemporaryDirectory() as name:
            mine, theirs = Path(name) / "tame", Path(name) / "llm-compressor"
            code = Path(name) / "peer.py"
            code.write_text(PEER)
            here = Path(__file__).parent.parent / "tame.py"
            ours = [sys.executable, str(here), "quantize", options.source, str(mine), "--method", method]
            others = [options.python, str(code), options.source, str(theirs), PRESETS[method]]
            commands = {"tame": [*ours, "--device", options.device], "llm-compressor": [*others, options.device]}
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
    one.add_argument("--text", nargs="+", required=True, help="what is judged: files, or python-docs")
    one.add_argument("--piqa", type=Path, help="PIQA's items, JSON a line: goal, sol1, sol2, label")
    one.add_argument("--items", type=int, default=200)
    one.add_argument("--tokens", type=int, default=4096, help="of each text")
    one.add_argument("--window", type=int, default=512)
    one.add_argument(
        "--calibrate", nargs="+", metavar="FILE", help="texts for calibrated variants; else Python's library"
    )
    one.add_argument("--sequences", type=int, default=64, help="of 512 tokens, of each of these")
    one.add_argument("--only", nargs="*", help="labels of variants")
    one.add_argument("--checkpoint", nargs="*", type=Path, default=[], help="folders that others quantized")
    one.add_argument("--device", default="cpu")
    one.add_argument("--folder", help="where temporary folders are made")
    one.add_argument("--json", type=Path, help="a file that gets every number, a JSON object a line")
    one.set_defaults(run=table)
    two = commands.add_parser("peer")
    two.add_argument("source", help="a folder")
    two.add_argument("--python", required=True, help="the Python of an environment with llm-compressor")
    two.add_argument("--methods", nargs="+", default=list(PRESETS), choices=tuple(PRESETS))
    two.add_argument("--device", default="cpu", help="of both")
    two.set_defaults(run=peer)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
