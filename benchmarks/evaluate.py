"""tame's evaluation beside a plain transformers loop and lm-evaluation-harness: the same work, in turn.

    python benchmarks/evaluate.py make --source DIR --out DIR            quantize int8, nf4, nf4-dq with transformers
    python benchmarks/evaluate.py processes --base DIR --variant DIR --text FILE [--tokens 30000] [--rounds 3]
    python benchmarks/evaluate.py tasks --variant DIR --piqa FILE [--items 200]
    python benchmarks/evaluate.py accuracy --base DIR --variant DIR… --text FILE
    python benchmarks/evaluate.py device [--device cuda] [--layers 28]   a random Qwen3-1.7B, tokens a second
    python benchmarks/evaluate.py stale --base DIR --variant DIR --piqa FILE   lm-eval's own cache, two models

`device` needs torch, transformers and bitsandbytes alone.
"""

import argparse
import json
import logging
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.filterwarnings("ignore")
METHODS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "processes", "tasks", "accuracy", "device", "stale", "side"])
    parser.add_argument("--side")
    for name in ("source", "out", "base", "text", "piqa", "cache"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--variant", nargs="*", default=[])
    for name, default in {"tokens": 30_000, "window": 512, "batch": 8, "rounds": 3, "items": 200, "layers": 28}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="*", default=["nf4", "int8"])
    args = parser.parse_args()
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


# One side of a comparison, as a whole process


def side(args: argparse.Namespace) -> None:
    print(json.dumps(globals()[f"side_{args.side}"](args)))


def side_tame_baseline(args: argparse.Namespace) -> Any:
    _worker(args, args.base, {"scores": args.cache})


def side_tame(args: argparse.Namespace) -> Any:
    import numpy as np

    out = tempfile.mkdtemp()
    _worker(args, args.variant[0], {"scores": out}, baseline=args.cache)
    measured = np.load(Path(out) / "windows.npz")
    loss = measured["loss"].astype(np.float64).mean()
    return {
        "perplexity": math.exp(loss),
        "kl": float(measured["kl"].mean()),
        "agreement": float(measured["agree"].mean()),
    }


def side_plain_perplexity(args: argparse.Namespace) -> Any:
    import torch

    ids, total = _ids(args, args.base), 0.0
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


def side_tame_tasks(args: argparse.Namespace) -> Any:
    out = Path(tempfile.mkdtemp())
    _worker(args, args.variant[0], {"tasks": str(out)}, tasks=args.cache)
    result = json.loads((out / "result.json").read_text())["tasks"]["piqa_own"]
    right = [json.loads(line)["acc"] for line in (out / "piqa_own.jsonl").read_text().splitlines()]
    return {**{key: result["metrics"][key] for key in ("acc", "acc_norm")}, "right": right}


def side_lm_eval(args: argparse.Namespace) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    result = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": args.variant[0]}, tasks=["piqa_own"], batch_size=args.batch,
        device=args.device, task_manager=TaskManager(include_path=args.cache), bootstrap_iters=0,
    )  # fmt: skip
    metrics = result["results"]["piqa_own"]
    right = [sample["acc"] for sample in result["samples"]["piqa_own"]]
    return {"acc": metrics["acc,none"], "acc_norm": metrics["acc_norm,none"], "right": right}


def _worker(
    args: argparse.Namespace, model: str, folders: dict[str, str], baseline: str | None = None, tasks: str | None = None
) -> Any:
    from configs.schema import Evaluate, TextSource
    from tasks.evaluate.lm_eval_index import TaskWork
    from tasks.evaluate.run import Work, measure

    spec = Evaluate(
        text=TextSource(builtin="python-docs"), window=args.window, max_tokens=max(args.tokens, args.window), batch_size=args.batch,
    )  # fmt: skip
    text = Path(args.text).read_text(encoding="utf-8") if args.text else None
    work = TaskWork(names=["piqa_own"], include=[tasks]) if tasks else None
    measure(
        Work(
            model=model, label="benchmark", device=args.device, trust_remote_code=False, spec=spec, text=text,
            baseline=baseline if "scores" in folders else tasks, baseline_model=args.base, tasks=work, folders=folders,
        )
    )  # fmt: skip


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


def _timed(args: argparse.Namespace, name: str, cache: str) -> tuple[float, float, Any]:
    """Seconds of a whole process by the clock and of CPU time, and what it found."""
    command = [sys.executable, __file__, "side", "--side", name, "--cache", cache, "--device", args.device]
    for key in ("base", "text", "piqa", "tokens", "window", "batch", "items"):
        if getattr(args, key) is not None:
            command += [f"--{key}", str(getattr(args, key))]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--variant", *args.variant[:1]],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    took, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return took, cpu, json.loads(done.stdout.splitlines()[-1])


def _in_turn(args: argparse.Namespace, names: list[str], cache: str) -> dict[str, Any]:
    """Time each side `rounds` times, the order reversed every other time. What each found."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    found: dict[str, Any] = {}
    for round_ in range(args.rounds):
        for name in names if round_ % 2 == 0 else names[::-1]:
            took, cpu, found[name] = _timed(args, name, cache)
            seconds[name].append((took, cpu))
            shown = {key: value for key, value in found[name].items() if key != "right"}
            print(f"{name:18} {took:7.1f} s  {cpu:7.1f} s of CPU time  {json.dumps(shown)}", flush=True)
    best = {name: [min(column) for column in zip(*values, strict=True)] for name, values in seconds.items()}
    for name in names[1:]:
        clock, cpu = (theirs / ours for theirs, ours in zip(best[name], best[names[0]], strict=True))
        print(f"{names[0]} is {clock:.2f} times as fast as {name}, by CPU time {cpu:.2f} (best of {args.rounds} each)")
    return found


def processes(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as cache:
        took, cpu, _ = _timed(args, "tame_baseline", cache)
        print(f"{'tame_baseline':18} {took:7.1f} s  {cpu:7.1f} s of CPU time, once for all variants")
        _in_turn(args, ["tame", "plain_all", "plain_perplexity"], cache)


def tasks(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _piqa(args, Path(folder))
        ours, theirs = (side["right"] for side in _in_turn(args, ["tame_tasks", "lm_eval"], folder).values())
        print(
            f"items that differ between the two: {sum(a != b for a, b in zip(ours, theirs, strict=True))} of {len(ours)}"
        )


def _piqa(args: argparse.Namespace, folder: Path) -> None:
    lines = Path(args.piqa).read_text(encoding="utf-8").splitlines()[: args.items]
    (folder / "piqa.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "piqa.yaml").write_text(
        f"""task: piqa_own
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/piqa.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1}}
"""
    )


def accuracy(args: argparse.Namespace) -> None:
    for variant in args.variant:
        args.variant = [variant]
        with tempfile.TemporaryDirectory() as cache:
            _timed(args, "tame_baseline", cache)
            floor = json.loads((Path(cache) / "result.json").read_text())["floor"]
            ours, plain = _timed(args, "tame", cache)[2], _timed(args, "plain_all", cache)[2]
        print(f"{Path(variant).name}: noise floor {json.dumps(floor)}")
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
    head = loaded.head
    found: list[Any] = []

    def run() -> None:
        with (folder / "hidden.bin").open("wb") as file:
            found[:] = [score(loaded, head, tokens, args.batch, None, silent, Kept(file))]

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
        lambda: score(loaded, head, tokens, args.batch, reference, silent),
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
