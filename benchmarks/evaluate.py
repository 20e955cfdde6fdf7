"""tame's evaluation beside a plain transformers loop and lm-evaluation-harness: the same work, in turn.

    python benchmarks/evaluate.py make --source DIR --out DIR            quantize int8, nf4, nf4-dq with transformers
    python benchmarks/evaluate.py processes --base DIR --variant DIR --text FILE [--tokens 30000] [--rounds 3]
    python benchmarks/evaluate.py perplexity --variant DIR --text FILE [--tokens 30000]
    python benchmarks/evaluate.py tasks --variant DIR --text FILE --piqa FILE [--items 200]
    python benchmarks/evaluate.py accuracy --base DIR --variant DIR… --text FILE
    python benchmarks/evaluate.py device [--device cuda] [--layers 28]   a random Qwen3-1.7B, tokens a second
    python benchmarks/evaluate.py stale --base DIR --variant DIR --piqa FILE   lm-eval's own cache, two models

tame's side is `tame evaluate`, and lm-eval's `lm_eval run`, as people run them, each a process that finds no cache.
`device` needs torch, transformers and bitsandbytes alone.
"""

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h: orphans become ours, so that their CPU time can be counted
METHODS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what", choices=["make", "processes", "perplexity", "tasks", "accuracy", "device", "stale", "side"]
    )
    parser.add_argument("--side")
    parser.add_argument("--sides", nargs="*", default=[], help="of processes: tame, tame_both, plain_all")
    for name in ("source", "out", "base", "text", "piqa"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--variant", nargs="*", default=[])
    for name, default in {"tokens": 30_000, "window": 512, "batch": 8, "rounds": 3, "items": 200, "layers": 28}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=["nf4", "int8"])
    args = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    globals()[args.what](args)


def make(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    for name, options in METHODS.items():
        model = AutoModelForCausalLM.from_pretrained(
            args.source, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map={"": args.device}
        )  # fmt: skip
        model.save_pretrained(Path(args.out) / name)
        AutoTokenizer.from_pretrained(args.source).save_pretrained(Path(args.out) / name)


# One side of a comparison, as a whole process: tame's and lm-eval's are their commands as shipped


def side(args: argparse.Namespace) -> None:
    print(json.dumps(globals()[f"side_{args.side}"](args)))


def side_plain_perplexity(args: argparse.Namespace) -> Any:
    import torch

    ids, total = _ids(args, args.variant[0]), 0.0
    model = _plain(args.variant[0], args.device)
    with torch.no_grad():
        for batch in ids.split(args.batch):
            logits = model(batch).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
    return {"perplexity": math.exp(total / ids[:, 1:].numel())}


def side_plain_all(args: argparse.Namespace) -> Any:
    import torch

    ids, loss, kl, agree = _ids(args, args.base), 0.0, 0.0, 0
    base, model = _plain(args.base, args.device), _plain(args.variant[0], args.device)
    with torch.no_grad():
        for batch in ids.split(args.batch):
            before = base(batch).logits[:, :-1].float().log_softmax(-1)
            after = model(batch).logits[:, :-1].float().log_softmax(-1)
            loss -= after.gather(-1, batch[:, 1:, None]).sum().item()
            kl += torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True).item()
            agree += int((before.argmax(-1) == after.argmax(-1)).sum())
    count = ids[:, 1:].numel()
    return {"perplexity": math.exp(loss / count), "kl": kl / count, "agreement": agree / count}


def tame_command(args: argparse.Namespace, *more: str) -> list[str]:
    """`tame evaluate` with the text, window and batch of the comparison, and `more`."""
    asked = {"--text": args.text, "--window": args.window, "--batch-size": args.batch, "--device": args.device}
    return [sys.executable, "-m", "tame", "evaluate", *(str(part) for pair in asked.items() for part in pair), *more]


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """Those of tame's numbers that the plain loops have, too."""
    names = {"perplexity": "perplexity", "kl_mean": "kl", "top1_agreement": "agreement"}
    names |= {f"task/piqa_own/{name}": name for name in ("acc", "acc_norm")}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def _plain(path: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map={"": device}).eval()


def _ids(args: argparse.Namespace, path: str) -> Any:
    import torch
    from transformers import AutoTokenizer

    text = Path(args.text).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"][: args.tokens]
    count = len(ids) // args.window
    return torch.tensor(ids[: count * args.window], device=args.device).view(count, args.window)


def command_of(args: argparse.Namespace, name: str, folder: Path, out: Path) -> list[str]:
    """The command of one side. `folder` has the tasks; `out` gets what it finds."""
    base, variant = str(args.base), args.variant[0]
    tokens = ("--max-tokens", str(args.tokens))
    json_out = ("--json", str(out / "tame.json"))
    if name in ("tame_both", "tame"):
        return tame_command(args, variant, "--baseline", base, *tokens, *json_out)
    if name == "tame_alone":
        return tame_command(args, variant, *tokens, *json_out)
    if name == "tame_tasks":  # a text is asked for: one window of it
        few = ("--max-tokens", str(args.window), "--tasks", "piqa_own", "--task-path", str(folder))
        return tame_command(args, variant, *few, *json_out)
    if name == "lm_eval":
        given = {"--model_args": f"pretrained={variant}", "--tasks": "piqa_own", "--include_path": folder}
        given |= {"--batch_size": args.batch, "--device": args.device, "--output_path": out}
        flat = [str(part) for pair in given.items() for part in pair]
        return [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *flat, "--log_samples"]
    command = [sys.executable, __file__, "side", "--side", name]
    for key in ("base", "text", "tokens", "window", "batch", "device"):
        command += [f"--{key}", str(getattr(args, key))]
    return [*command, "--variant", variant]


def found_by(name: str, stdout: str, home: Path, out: Path) -> dict[str, Any]:
    """The numbers that one side has found, and which items it had right."""
    if name.startswith("tame"):
        rows = home.glob("artifacts/tasks-*/files/piqa_own.jsonl")
        right = [json.loads(line)["acc"] for path in rows for line in path.read_text().splitlines()]
        return {
            **numbers(json.loads((out / "tame.json").read_text())["metrics"]),
            **({"right": right} if right else {}),
        }
    if name == "lm_eval":
        (results,) = out.rglob("results_*.json")
        (samples,) = out.rglob("samples_*.jsonl")
        scores = json.loads(results.read_text())["results"]["piqa_own"]
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        return {"acc": scores["acc,none"], "acc_norm": scores["acc_norm,none"], "right": [row["acc"] for row in rows]}
    found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    return found


def wait_for_orphans() -> None:
    """The fork server that tame's stages come from ends a little after it, and has the CPU time of all of them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _timed(args: argparse.Namespace, name: str, folder: Path) -> tuple[float, float, Any]:
    """Seconds of a whole process by the clock and of CPU time, its children's with it, and what it found.

    tame finds nothing in its cache but, for the side `tame`, what `processes` has measured of the baseline before.
    """
    with tempfile.TemporaryDirectory() as fresh:
        home, out = Path(fresh) / "home", Path(fresh) / "out"
        out.mkdir()
        if name == "tame":
            shutil.copytree(folder / "home", home)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run(
            command_of(args, name, folder, out), env={**os.environ, "TAME_HOME": str(home)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True,
        )  # fmt: skip
        took = time.perf_counter() - started
        wait_for_orphans()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        return took, cpu, found_by(name, done.stdout, home, out)


def _in_turn(args: argparse.Namespace, names: list[str], folder: Path) -> dict[str, Any]:
    """Time each side `rounds` times, the order reversed every other time. What each found."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    found: dict[str, Any] = {}
    for round_ in range(args.rounds):
        for name in names if round_ % 2 == 0 else names[::-1]:
            took, cpu, found[name] = _timed(args, name, folder)
            seconds[name].append((took, cpu))
            shown = {key: value for key, value in found[name].items() if key != "right"}
            print(f"{name:18} {took:7.1f} s  {cpu:7.1f} s of CPU time  {json.dumps(shown)}", flush=True)
    best = {name: [min(column) for column in zip(*values, strict=True)] for name, values in seconds.items()}
    for name in names[1:]:
        clock, cpu = (theirs / ours for theirs, ours in zip(best[name], best[names[0]], strict=True))
        print(f"{names[0]} is {clock:.2f} times as fast as {name}, by CPU time {cpu:.2f} (best of {args.rounds} each)")
    return found


def processes(args: argparse.Namespace) -> None:
    """The three metrics: with a baseline that is measured in the same command, and with one that was before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = tame_command(args, str(args.base), "--baseline", str(args.base), "--max-tokens", str(args.tokens))
        environment = {**os.environ, "TAME_HOME": str(folder / "home")}
        subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        wait_for_orphans()
        found = _in_turn(args, args.sides or ["tame", "tame_both", "plain_all"], folder)
    for key, value in found["tame"].items():
        print(f"{key:11} tame {value:.5f}  plain loop {found['plain_all'][key]:.5f}")


def perplexity(args: argparse.Namespace) -> None:
    """Perplexity alone."""
    _in_turn(args, ["tame_alone", "plain_perplexity"], Path())


def tasks(args: argparse.Namespace) -> None:
    """PIQA, beside lm-evaluation-harness's own command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tasks"
        folder.mkdir()
        _piqa(args, folder)
        ours, theirs = (side["right"] for side in _in_turn(args, ["tame_tasks", "lm_eval"], folder).values())
    print(f"items that differ between the two: {sum(a != b for a, b in zip(ours, theirs, strict=True))} of {len(ours)}")


def _piqa(args: argparse.Namespace, folder: Path) -> None:
    from benchmarks.piqa import write_task

    write_task(Path(args.piqa), args.items, folder, ("acc", "acc_norm"))


def accuracy(args: argparse.Namespace) -> None:
    for variant in args.variant:
        args.variant = [variant]
        ours, plain = (_timed(args, name, Path())[2] for name in ("tame_both", "plain_all"))
        print(Path(variant).name)
        for name, value in ours.items():
            off = value - plain[name] if name == "agreement" else value / plain[name] - 1
            print(f"  {name:11} tame {value:.5f}  plain loop {plain[name]:.5f}  {off:+.4f}", flush=True)


def stale(args: argparse.Namespace) -> None:
    """Two models under one path, one after the other, through lm-eval's use_cache."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from tasks.evaluate.model import quiet

    quiet()
    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _piqa(args, folder)
        manager = TaskManager(include_path=name, include_defaults=False)
        for cache in (f"{name}/cache", None):
            for model in (args.base, args.variant[0]):
                (folder / "model").unlink(missing_ok=True)
                (folder / "model").symlink_to(Path(model).absolute())
                result = lm_eval.simple_evaluate(
                    model="hf", model_args={"pretrained": f"{name}/model"}, tasks=["piqa_own"], task_manager=manager,
                    batch_size=args.batch, device=args.device, use_cache=cache, bootstrap_iters=0,
                )  # fmt: skip
                answers = [sample["filtered_resps"][0][0] for sample in result["samples"]["piqa_own"]]
                print(
                    f"{Path(model).name:16} cache {'on ' if cache else 'off'} mean log-likelihood {sum(answers) / len(answers):.4f}"
                )


# A device's tokens a second


def device(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen3Config

    from tasks.evaluate.model import quiet

    quiet()
    window = args.window if args.window != 512 else 2048
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=args.layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
    )  # fmt: skip
    if args.device == "cuda":
        args.device = "cuda:0"
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(name)
        del model
        tokens = torch.randint(0, 151_000, (args.tokens // window, window), dtype=torch.int32).numpy()
        plain = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map={"": args.device}).eval()
        kept = _device_baseline(args, plain, tokens, Path(name))
        del plain
        for method in args.methods:
            options = {**METHODS[method], **({"bnb_4bit_compute_dtype": torch.bfloat16} if "4" in method else {})}
            quantized = AutoModelForCausalLM.from_pretrained(
                name, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map={"": args.device}
            ).eval()  # fmt: skip
            _device_variant(args, method, quantized, tokens, Path(name), kept)
            del quantized


def _rate(args: argparse.Namespace, what: str, tokens: Any, function: Any) -> float:
    import torch

    function()  # compiles, and warms up
    best = math.inf
    for _ in range(args.rounds):
        if args.device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        if args.device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    memory = f"  peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device != "cpu" else ""
    print(f"{what:44} {tokens.size / best:9,.0f} tokens/s{memory}", flush=True)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    return tokens.size / best


def _loaded(args: argparse.Namespace, model: Any) -> Any:
    from tasks.evaluate.model import Loaded

    return Loaded(model, None, args.device, "bfloat16", "as stored", 0.0)


def _device_baseline(args: argparse.Namespace, model: Any, tokens: Any, folder: Path) -> Any:
    from tasks.evaluate.scoring import Kept, score
    from tasks.runtime.progress import silent

    _rate(args, f"bf16, plain perplexity loop, batch {args.batch}", tokens, lambda: _plain_loop(model, tokens, args))
    loaded = _loaded(args, model)
    found: list[Any] = []

    def run() -> None:
        with (folder / "hidden.bin").open("wb") as file:
            found[:] = [score(loaded, tokens, args.batch, None, silent, Kept(file))]

    _rate(args, f"bf16, tame's baseline, batch {args.batch}", tokens, run)
    size = (folder / "hidden.bin").stat().st_size
    print(
        f"the baseline keeps {size / tokens.size:.0f} bytes a token: {300_000 * size / tokens.size / 1e9:.2f} GB for 300,000"
    )
    return found[0]


def _device_variant(args: argparse.Namespace, name: str, model: Any, tokens: Any, folder: Path, kept: Any) -> None:
    from tasks.evaluate.model import dequantize
    from tasks.evaluate.scoring import Reference, score
    from tasks.runtime.progress import silent

    plain = _rate(
        args, f"{name}, plain perplexity loop, batch {args.batch}", tokens, lambda: _plain_loop(model, tokens, args)
    )
    loaded = _loaded(args, model)
    dequantize(loaded)
    head = loaded.head
    reference = Reference(folder / "hidden.bin", head, kept.log_sum, kept.top, head.weight.shape[1])
    ours = _rate(
        args, f"{name}, tame: perplexity, KL, agreement, batch {args.batch}", tokens,
        lambda: score(loaded, tokens, args.batch, reference, silent),
    )  # fmt: skip
    print(f"{name}: tame's three at {ours / plain:.3f} times the rate of the plain loop's one")


def _plain_loop(model: Any, tokens: Any, args: argparse.Namespace) -> float:
    import torch

    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(tokens), args.batch):
            ids = torch.from_numpy(tokens[start : start + args.batch]).long().to(args.device)
            logits = model(ids).logits
            for i in range(len(ids)):
                total += torch.nn.functional.cross_entropy(logits[i, :-1].float(), ids[i, 1:], reduction="sum").item()
    return total


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
