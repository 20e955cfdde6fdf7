"""What fitting costs and what it gives: `python -m benchmarks.fit speed|table …`; the tables are in RESULTS.md.

speed    a model of random weights of an architecture: seconds for the sensitivities of all groups, and GPU memory
table    a real model: KL on the fit text of mixes of equal size, by how their groups were chosen:
         fit             what tame takes: KL of each group alone for its bytes
         random          groups in random order (a row a seed)
         weight error    largest relative error of the weights first
         gradient        sum of |gradient · change of the weight| for its bytes, as auto-round's AutoScheme scores layers
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.calibrate import SHAPES
from configs.schema import Calibrate, CalibrationSource, Fit, Gate, Source, Variant
from tasks.fitted import FitGroup
from tasks.quantize.methods import method_of
from tasks.quantize.protocols import Request
from tasks.runtime.device import pick


def speed(options: argparse.Namespace) -> None:
    """Time the sensitivities of one architecture."""
    import torch
    import transformers
    from safetensors.torch import save_file

    from tasks.fit import search

    kind, shape = SHAPES[options.model]
    device = pick(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, out = Path(name) / "model", Path(name) / "nf4"
        config = getattr(transformers, kind)(**{"max_position_embeddings": 4096, **shape})
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        out.mkdir()
        variant = Variant(method="nf4")
        method_of(variant).quantize(Request(folder, out, variant, device))
        ids = torch.randint(0, config.vocab_size, (search.WINDOWS, search.LENGTH), dtype=torch.int32)
        save_file({"ids": ids}, Path(name) / "ids.safetensors")
        asked = search.Asked(folder, out, variant, ids=Path(name) / "ids.safetensors", device=device)
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        search.sensitivities(asked, Path(name))
        seconds = time.perf_counter() - started
        groups = len(json.loads((Path(name) / search.SENSITIVITIES).read_bytes())["groups"])
        memory = "" if device == "cpu" else f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory"
        print(f"{options.model} on {device}: {seconds:.0f} s for {groups} groups and the whole{memory}")


def table(options: argparse.Namespace) -> None:
    """Compare ways to choose groups, at equal bytes."""
    from safetensors.torch import load_file

    from tasks.calibrate.prepare import calibrate
    from tasks.download.inspection import inspect_source
    from tasks.download.task import download
    from tasks.fit import task
    from tasks.fit.limits import measure_of
    from tasks.fit.search import WHOLE
    from tasks.fit.walk import Walk
    from tasks.fit.weights import Restorer

    source = Source(model=options.model)
    snapshot, device = download(source, inspect_source(source)), pick(options.device)
    spec = Calibrate(text=CalibrationSource(files=options.text)) if options.text else Calibrate()
    chosen: Any = {"no": False, "true": True}.get(options.calibrate, options.calibrate)
    fits = []
    for most in options.bytes:
        variant = Variant(method="nf4", calibrate=chosen, fit=Fit(max_bytes=most))
        calibration = calibrate(snapshot, spec) if chosen else None
        started = time.perf_counter()
        fits.append(task.fit(snapshot, variant, Gate(), spec, calibration, device=options.device))
        print(f"{most}: {time.perf_counter() - started:.0f} s ({fits[-1].seconds:.0f} s when made)", flush=True)
    groups = fits[0].groups
    windows, length = WHOLE[device.partition(":")[0]]
    ids = load_file(task.fit_text(snapshot, spec)[0] / task.IDS)["ids"].long()
    ids = ids[:: max(1, len(ids) // windows)][:windows, :length]
    restorer = Restorer(Path(snapshot.path), Path(fits[0].codes), variant.unfitted)
    level = [lambda name: restorer.weight(name, device)]
    walk = Walk(Path(snapshot.path), ids, set(restorer.jobs), level, device)
    orders = _orders(groups, Path(snapshot.path), restorer, ids, device, options.seeds)
    print("| most bytes | chosen by | modules in 16 bits | KL on the fit text |\n| --- | --- | --- | --- |")
    for most, fitted in zip(options.bytes, fits, strict=True):
        room = fitted.taken.bytes - fitted.measured[0].bytes
        mixes = {"fit": set(fitted.modules)} | {name: _fill(groups, order, room) for name, order in orders.items()}
        for name, kept in mixes.items():
            mix = {f"{module}.weight": 0 for group in groups for module in group.modules if module not in kept}
            found = measure_of(walk.measure([mix], lambda *_: None, name)[0])
            interval = f"{found.kl[1]:.4f} to {found.kl[2]:.4f}"
            print(f"| {most} | {name} | {len(kept)} | {found.kl[0]:.4f} ({interval}) |", flush=True)


def _orders(
    groups: list[FitGroup], folder: Path, restorer: Any, ids: Any, device: str, seeds: int
) -> dict[str, list[FitGroup]]:
    """Groups by each of the other ways, the first to stay in 16 bits first."""
    found: dict[str, list[FitGroup]] = {}
    for seed in range(seeds):
        found[f"random {seed}"] = random.Random(seed).sample(groups, len(groups))
    error, gradient = _scores(folder, restorer, ids, device)

    def by(score: Callable[[FitGroup], float]) -> list[FitGroup]:
        return sorted(groups, key=lambda group: -score(group))

    found["weight error"] = by(lambda group: max(error[name] for name in group.modules))
    found["gradient"] = by(lambda g: sum(gradient[name] for name in g.modules) / (g.bytes[-1] - g.bytes[0]))
    return found


def _scores(folder: Path, restorer: Any, ids: Any, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """For each module the relative error of its weight, and the sum of |gradient of the loss · change of the weight|."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for window in ids.to(device).split(1):
        (model(window, labels=window, use_cache=False).loss / len(ids)).backward()
    error, gradient = {}, {}
    for name in restorer.jobs:
        weight = model.get_parameter(name)
        with torch.no_grad():
            change = restorer.weight(name, device)
            change = change - (weight.T if restorer.jobs[name].transposed else weight)
            module = name.removesuffix(".weight")
            error[module] = float(change.norm() / weight.norm())
            slope = weight.grad.T if restorer.jobs[name].transposed else weight.grad
            gradient[module] = float((slope * change).abs().sum())
    return error, gradient


def _fill(groups: list[FitGroup], order: list[FitGroup], room: int) -> set[str]:
    """The modules of the first groups that fit into `room` more bytes, and of later ones that still do."""
    kept: set[str] = set()
    for group in order:
        more = group.bytes[-1] - group.bytes[0]
        if more <= room:
            room -= more
            kept |= set(group.modules)
    return kept


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.set_defaults(run=speed)
    command.add_argument("model", choices=tuple(SHAPES))
    command.add_argument("--folder", help="where the model is made; it takes its size in bf16 and half of that again")
    command = commands.add_parser("table")
    command.set_defaults(run=table)
    command.add_argument("model", help="a folder, a Hub repo, or package:NAME/FILE")
    command.add_argument("--bytes", nargs="+", default=["125MB"], help="sizes of the weights")
    command.add_argument("--calibrate", default="no", choices=("no", "fast", "true", "best"))
    command.add_argument("--text", nargs="+", help="files of the calibration text; by default Python's own library")
    command.add_argument("--seeds", type=int, default=3)
    for command in commands.choices.values():
        command.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
