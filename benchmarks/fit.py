"""What fitting costs and what it gives: `python -m benchmarks.fit speed|table …`; the tables are in RESULTS.md.

speed    a model of random weights of an architecture: seconds for the sensitivities of all groups, and GPU memory
table    a real model: KL on the fit text, and on texts to judge by, of mixes of equal size, by how their groups were chosen:
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
    """Compare ways to choose groups, at equal bytes, on the fit text and on texts that nothing was chosen on."""
    from safetensors.torch import load_file

    from tasks.calibrate.task import calibrate
    from tasks.download.inspection import inspect_source
    from tasks.download.task import download
    from tasks.fit import task
    from tasks.fit.search import WHOLE
    from tasks.fit.weights import Restorer
    from tasks.quantize.task import quantize

    source = Source(model=options.model)
    snapshot, device = download(source, inspect_source(source)), pick(options.device)
    text = CalibrationSource(files=options.text or None, builtin=None if options.text else "python-library")
    spec = Calibrate(text=text, sequences=options.sequences, length=options.length)
    chosen: Any = {"no": False, "true": True}.get(options.calibrate, options.calibrate)
    fits = []
    limits = [Fit(max_mean_kl=most) for most in options.kl] or [Fit(max_bytes=most) for most in options.bytes]
    for limit in limits:
        variant = Variant(method="nf4", calibrate=chosen, fit=limit)
        calibration = calibrate(snapshot, spec, "codes") if chosen else None
        started = time.perf_counter()
        fits.append(task.fit(snapshot, variant, Gate(), spec, calibration, device=options.device))
        taken = fits[-1].taken
        print(
            f"{fits[-1].limit}: {time.perf_counter() - started:.0f} s ({fits[-1].seconds:.0f} s when made), "
            f"{taken.bytes / 1e6:.1f} MB, {len(fits[-1].measured)} measured",
            flush=True,
        )
    groups = fits[0].groups
    windows, length = WHOLE[device.partition(":")[0]]
    ids = load_file(task.fit_text(snapshot, spec, "fit" if chosen else "all")[0] / task.IDS)["ids"].long()
    ids = ids[:: max(1, len(ids) // windows)][:windows, :length]
    texts = {"the fit text": ids} | {Path(name).stem: _windows(snapshot.path, name, ids) for name in options.judge}
    whole = quantize(snapshot, variant.unfitted, calibration, device=options.device)
    restorer = Restorer(Path(snapshot.path), Path(whole.path), variant.unfitted)
    orders = _orders(groups, Path(snapshot.path), restorer, ids, device, options.seeds) if options.others else {}
    print(
        f"| most bytes | chosen by | modules in 16 bits | {' | '.join(texts)} |\n| --- | --- | --- |{' --- |' * len(texts)}"
    )

    def row(most: str, name: str, kept: list[str], finer: list[str] | None = None) -> None:
        made, of = whole, variant.unfitted
        if finer or (kept and variant.compensates):
            of = variant.keeping(kept, finer)
            made = quantize(snapshot, of, calibration, device=options.device)
        own = Restorer(Path(snapshot.path), Path(made.path), of)
        told = [_measured(snapshot.path, text, own, device, set(kept)) for text in texts.values()]
        print(f"| {most} | {name} | {len(kept)} | {' | '.join(told)} |", flush=True)

    row("", "all quantized", [])
    for fitted in fits:
        most = fitted.limit
        row(
            most,
            f"fit, and {len(fitted.in_small_groups)} modules in small groups",
            fitted.modules,
            fitted.in_small_groups,
        )
        room = fitted.taken.bytes - fitted.measured[0].bytes
        for name, order in orders.items():
            row(most, name, sorted(_fill(groups, order, room)))


def _windows(model: str, file: str, like: Any) -> Any:
    """As many windows of a text's beginning as `like` has, of as many tokens, Int64."""
    import torch
    from transformers import AutoTokenizer

    text = Path(file).read_text(encoding="utf-8")[: like.numel() * 20]
    tokens = AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = like.shape[1]
    return torch.tensor(tokens[: min(len(tokens), like.numel()) // length * length]).view(-1, length)


def _measured(model: str, ids: Any, restorer: Any, device: str, kept: set[str]) -> str:
    """The KL of a mix on a text, with its interval."""
    from tasks.fit.limits import measure_of
    from tasks.fit.walk import Walk

    walk = Walk(Path(model), ids, set(restorer.jobs), [lambda name: restorer.weight(name, device)], device)
    mix = {name: 0 for name in restorer.jobs if name.removesuffix(".weight") not in kept}
    value, low, high = measure_of(walk.measure([mix], lambda *_: None, "")[0]).kl
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def _orders(
    groups: list[FitGroup], folder: Path, restorer: Any, ids: Any, device: str, seeds: int
) -> dict[str, list[FitGroup]]:
    """Groups by each of the other ways, the first to stay in 16 bits first."""
    found: dict[str, list[FitGroup]] = {}
    error, gradient = _scores(folder, restorer, ids, device)

    def by(score: Callable[[FitGroup], float]) -> list[FitGroup]:
        return sorted(groups, key=lambda group: -score(group))

    found["weight error"] = by(lambda group: max(error[name] for name in group.modules))
    found["gradient"] = by(lambda g: sum(gradient[name] for name in g.modules) / (g.bytes[-1] - g.bytes[0]))
    for seed in range(seeds):
        found[f"random {seed}"] = random.Random(seed).sample(groups, len(groups))
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
    command.add_argument("--kl", nargs="+", type=float, default=[], help="most mean KLs, in the place of sizes")
    command.add_argument("--others", default=True, action=argparse.BooleanOptionalAction, help="the other ways too")
    command.add_argument("--calibrate", default="no", choices=("no", "fast", "true", "best"))
    command.add_argument("--text", nargs="+", help="files of the calibration text; by default Python's own library")
    command.add_argument("--sequences", type=int, default=128, help="of each, and the tokens in each:")
    command.add_argument("--length", type=int, default=2048)
    command.add_argument("--judge", nargs="+", default=[], help="files of other texts that the mixes are measured on")
    command.add_argument("--seeds", type=int, default=3)
    for command in commands.choices.values():
        command.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
