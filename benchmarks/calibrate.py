"""What calibrating costs and what it gives: `python benchmarks/calibrate.py speed|quality …`; the tables are in RESULTS.md.

speed    a model of random weights of an architecture: seconds without imports, GPU memory, and memory of the process
quality  a real model, calibrated on some texts and judged on others: KL from the original, beside plain rounding's
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.schema import Calibrate, CalibrationSource, Source, Variant
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request
from tasks.values import Calibration

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("LlamaConfig", {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "smollm2": (
        "LlamaConfig",
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        },
    ),
    "1.7b": (
        "Qwen3Config",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "8b": (
        "Qwen3Config",
        {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        },
    ),
}  # fmt: skip


def speed(options: argparse.Namespace) -> None:
    """Time one architecture."""
    import torch
    import transformers
    from safetensors.torch import save_file

    kind, shape = SHAPES[options.model]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = getattr(transformers, kind)(**{"max_position_embeddings": 4096, **shape})
        if options.blocks:
            config.num_hidden_layers = options.blocks
            if hasattr(config, "layer_types"):
                config.layer_types = config.layer_types[: options.blocks]
        torch.manual_seed(0)
        with torch.device("cuda" if options.device == "cuda" else "cpu"):
            transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
                folder / "model"
            )
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(0, config.vocab_size, (options.sequences, options.length), dtype=torch.int32)
        save_file({"ids": ids}, folder / "ids.safetensors")
        made = Calibration(path=str(folder), digest="", texts=[], sequences=len(ids), length=options.length)
        (folder / "out").mkdir()
        level: Any = True if options.level == "true" else options.level
        variant = Variant(method="nf4", calibrate=level)
        request = Request(folder / "model", folder / "out", variant, options.device, calibration=made)
        started = time.monotonic()
        method_of(variant).quantize(request)
        found = {
            "model": options.model,
            "blocks": config.num_hidden_layers,
            "sequences": list(ids.shape),
            "level": options.level,
            "seconds": round(time.monotonic() - started, 1),
            "process_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        }
        if options.device == "cuda":
            found["gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(json.dumps(found), flush=True)


def quality(options: argparse.Namespace) -> None:
    """Calibrate, and measure KL on other texts."""
    from tasks.calibrate.task import calibrate
    from tasks.download.task import download

    snapshot = download(Source(model=options.source))
    spec = Calibrate(
        text=CalibrationSource(files=options.calibrate), sequences=options.sequences, length=options.length
    )
    made = calibrate(snapshot, spec)
    print(f"sequences: {made.path}", flush=True)
    judged = {
        Path(text).name: _windows(snapshot.path, Path(text), options.window, options.tokens) for text in options.text
    }
    baseline = {name: _logits(_loaded(snapshot.path, options.device), windows) for name, windows in judged.items()}
    plain: dict[str, float] = {}
    for level in (False, *({"true": True}.get(level, level) for level in options.levels)):
        variant = Variant(
            method=options.method, double_quant=options.double_quant, group_size=options.group_size, calibrate=level
        )
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            request = Request(Path(snapshot.path), Path(name), variant, options.device, calibration=made)
            started = time.monotonic()
            method_of(variant).quantize(request)
            seconds = time.monotonic() - started
            model = _loaded(name, options.device)
            method_of(variant).densify(model, 1 << 60)
            found = {text: _divergence(model, windows, baseline[text]) for text, windows in judged.items()}
        plain = plain or found
        shown = "  ".join(f"{text} {value:.4f} ({value / plain[text]:.3f})" for text, value in found.items())
        print(f"{variant.label}  {seconds:.1f} s  {shown}", flush=True)


def _windows(folder: str, text: Path, window: int, tokens: int) -> Any:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def _loaded(folder: str, device: str) -> Any:
    import torch
    import transformers

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}).eval()


def _logits(model: Any, windows: Any) -> list[Any]:
    import torch

    with torch.inference_mode():
        return [model(input_ids=row[None].to(model.device)).logits.float().log_softmax(-1)[0, :-1] for row in windows]


def _divergence(model: Any, windows: Any, baseline: list[Any]) -> float:
    """The mean KL from the baseline, nats a token."""
    total = 0.0
    for row, known in zip(windows, baseline, strict=True):
        (found,) = _logits(model, row[None])
        total += float((known.exp() * (known - found)).sum(-1).mean())
    return total / len(windows)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speed")
    one.add_argument("--model", choices=tuple(SHAPES), default="tiny")
    one.add_argument("--blocks", type=int, help="fewer than the architecture has")
    one.add_argument("--level", choices=("fast", "true", "best"), default="true")
    one.set_defaults(run=speed)
    two = commands.add_parser("quality")
    two.add_argument("source")
    two.add_argument("--calibrate", nargs="+", required=True, metavar="FILE")
    two.add_argument("--text", nargs="+", required=True, metavar="FILE", help="what is judged")
    two.add_argument("--levels", nargs="+", default=["fast", "true"], choices=("fast", "true", "best"))
    two.add_argument("--method", default="nf4")
    two.add_argument("--double-quant", action="store_true")
    two.add_argument("--group-size", type=int)
    two.add_argument("--window", type=int, default=512)
    two.add_argument("--tokens", type=int, default=16384, help="of each text that is judged")
    two.set_defaults(run=quality)
    for command in (one, two):
        command.add_argument("--sequences", type=int, default=64)
        command.add_argument("--length", type=int, default=512)
        command.add_argument("--device", default="cpu")
        command.add_argument("--folder", help="where temporary folders are made")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
