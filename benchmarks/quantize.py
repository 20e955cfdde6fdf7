"""`tame quantize` beside transformers' own load and save: whole processes, as people run them, in turn.

    python benchmarks/quantize.py --model 1.7b --methods nf4,int8 --repeat 3
    python benchmarks/quantize.py --device cuda --model 1.7b --methods int8,nf4,nf4-dq
    python benchmarks/quantize.py --device cuda --exactness
    for k in 1 2 3 4; do python benchmarks/quantize.py --device cuda --exactness --share $k/4 --work /tmp/exact-$k & done; wait

The model is made here: random weights in the shapes of Qwen3-1.7B and others. Prints markdown. What is timed is a process from
its start to its end, with all that it starts; its CPU time says more than the clock where a machine is shared. Memory is the peak
of the proportional set sizes (PSS) of all these processes together, looked at five times a second, so that pages they share count
once. "Above imports" is that less the same for a model of a few megabytes, which takes what the libraries take. `--exactness` needs
torch, transformers, bitsandbytes, accelerate, pydantic, psutil, filelock, xxhash and PyYAML alone.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048,
    "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (
        {**QWEN3, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4},
        10**12,
    ),
    "0.4b": ({**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18}, 10**12),
    "0.6b": ({**QWEN3, "hidden_size": 1024, "intermediate_size": 3072}, 10**12),
    "1.7b": (QWEN3, 10**12),
    "8b": (
        {
            **QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
        2 * 10**9,
    ),
}  # config, and bytes a file


BY_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

source, out, device, kind = sys.argv[1:]
if kind == "int8":
    config = BitsAndBytesConfig(load_in_8bit=True)
else:
    double = kind.endswith("-dq")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind.removesuffix("-dq"), bnb_4bit_use_double_quant=double
    )
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map={"": device}, dtype="auto")
model.save_pretrained(out)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or cuda:N")
    parser.add_argument("--model", default="1.7b", choices=MODELS)
    parser.add_argument("--methods", default="int8,nf4,nf4-dq")
    parser.add_argument("--who", default="tame,transformers")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--work", type=Path, default=Path("/tmp/tame-benchmark"), help="where models are made")
    parser.add_argument("--exactness", action="store_true", help="compare bytes instead, over tiny architectures")
    parser.add_argument(
        "--share", default="1/1", metavar="K/N", help="with --exactness: every N-th architecture, from the K-th"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.exactness:
        exactness(options)
    else:
        side_by_side(options)


@dataclass(frozen=True)
class Run:
    """What one whole process, and all that it started, took."""

    seconds: float
    cpu: float
    """Seconds, on all cores."""
    memory: int
    """Peak, bytes."""
    gpu: int
    """Peak of what the GPU's memory held more than before, bytes, the driver's own included."""
    written: int
    """Bytes of weight files."""


def side_by_side(options: argparse.Namespace) -> None:
    """Print a line for each process, and then how much faster tame is."""
    source, small = make_model(options.work, options.model), make_model(options.work, "tiny")
    read = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    reading, writing = disk_speed(source, options.work)
    print(
        f"{options.model}, {read / 1e9:.2f} GB of bf16, on {options.device}. The disk reads {reading / 1e9:.2f} GB/s and ",
        end="",
    )
    print(f"writes {writing / 1e9:.2f} GB/s (page cache); the floor is bytes read and written at that.\n")
    print(
        "| method | who | whole process s | CPU s | host peak above imports MB | GPU peak MB | bytes | floor s | load before |"
    )
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: |")
    for method in options.methods.split(","):
        runs: dict[str, list[Run]] = {who: [] for who in options.who.split(",")}
        imports = {who: run(who, method, small, options).memory for who in runs}
        for _ in range(options.repeat):
            for who, done in runs.items():
                load = os.getloadavg()[0]
                done.append(found := run(who, method, source, options))
                floor = read / reading + found.written / writing
                print(
                    f"| {method} | {who} | {found.seconds:.1f} | {found.cpu:.1f} | {(found.memory - imports[who]) / 1e6:,.0f} | "
                    f"{found.gpu / 1e6:,.0f} | {found.written:,} | {floor:.1f} | {load:.1f} |",
                    flush=True,
                )
        if len(runs) == 2:
            pairs = [b.seconds / a.seconds for a, b in zip(*runs.values(), strict=True)]
            best = [min(found.seconds for found in done) for done in runs.values()]
            cpu = [min(found.cpu for found in done) for done in runs.values()]
            print(
                f"| {method} | times | **{best[1] / best[0]:.2f}** best by best, {statistics.median(pairs):.2f} the median of "
                f"pairs ({', '.join(f'{pair:.2f}' for pair in pairs)}) | {cpu[1] / cpu[0]:.2f} | | | | | |",
                flush=True,
            )


def run(who: str, method: str, source: Path, options: argparse.Namespace) -> Run:
    """Quantize once, in a process as people start it."""
    out = options.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    if who == "tame":
        kind = ["--method", method.removesuffix("-dq"), *(["--double-quant"] if method.endswith("-dq") else [])]
        extra = ["--workers", str(options.workers)] if options.workers else []
        command = ["-m", "tame", "quantize", str(source), str(out), *kind, "--device", options.device, *extra]
    else:
        command = ["-c", BY_TRANSFORMERS, str(source), str(out), options.device, method]
    with tempfile.TemporaryDirectory() as home, watching_gpu(options.device) as gpu:
        environment = {**os.environ, "TAME_HOME": home, "PYTHONPATH": str(ROOT)}
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        memory = Memory(process.pid)
        _, errors = process.communicate()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        memory.stop()
    if process.returncode:
        sys.exit(f"{who} {method} failed:\n{errors[-3000:]}")
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, memory.peak, gpu.peak, written)


class Watch(threading.Thread):
    """Looks at something again and again, and keeps the largest number."""

    def __init__(self, every: float) -> None:
        super().__init__(daemon=True)
        self.every, self.peak, self.ended = every, 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Look until `stop`."""
        while not self.ended.wait(self.every):
            self.peak = max(self.peak, self.look())

    def look(self) -> int:
        """The number now."""
        raise NotImplementedError

    def stop(self) -> None:
        """Look no more."""
        self.ended.set()
        self.join()


class Memory(Watch):
    """The proportional set sizes of a process and all its descendants, in bytes."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        super().__init__(0.2)

    def look(self) -> int:
        """Of those that are there; each may end meanwhile."""
        total, pids = 0, [self.pid]
        for pid in pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += 1024 * int(rollup.split("\nPss:")[1].split()[0])
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    pids += [int(child) for child in (thread / "children").read_text().split()]
        return total


class GPU(Watch):
    """What the GPU's memory holds more than at first, in bytes, as the driver says; 0 without one."""

    def __init__(self, device: str) -> None:
        self.number = device.partition(":")[2] or "0"
        self.before = self.used()
        super().__init__(0.2)

    def used(self) -> int:
        """What the driver says."""
        command = ["nvidia-smi", "-i", self.number, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 2**20

    def look(self) -> int:
        """More than before."""
        return self.used() - self.before


class NoGPU:
    """In place of `GPU` on a CPU."""

    peak = 0


@contextlib.contextmanager
def watching_gpu(device: str) -> Iterator[Any]:
    if not device.startswith("cuda"):
        yield NoGPU()
        return
    watch = GPU(device)
    try:
        yield watch
    finally:
        watch.stop()


def exactness(options: argparse.Namespace) -> None:
    """Compare every tensor, and the file, with what transformers saves."""
    import transformers

    from tasks.runtime.quiet import quieten
    from tests.models import ZOO, quantize, tiny, zoo

    quieten()

    methods = ("int8", "nf4", "nf4-dq", "fp4", "fp4-dq")
    print(
        f"transformers {transformers.__version__}, {options.device}. `file`: the same file; `tensors`: the same tensors, names, ",
        end="",
    )
    print("dtypes, shapes and bytes; config: the same quantization_config.\n")
    print(
        f"| architecture | stored as | share quantized | {' | '.join(methods)} |\n| --- | --- | --: |{' --- |' * len(methods)}"
    )
    counts: Counter[str] = Counter()
    first, every = (int(number) for number in options.share.split("/"))
    for name in list(ZOO)[first - 1 :: every]:
        for dtype, sharded in (("bfloat16", False), ("float16", True), ("float32", False)):
            folder = options.work / "zoo"
            shutil.rmtree(folder, ignore_errors=True)
            save = {"max_shard_size": "60KB"} if sharded else {}
            source = tiny(folder / "source", zoo(name), dtype, spread=True, **save)
            cls = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
            cells = []
            share = 0.0
            for method in methods:
                mine, theirs = folder / method, folder / f"{method}-transformers"
                mine.mkdir()
                try:
                    made = quantize(source, mine, variant_of(method), device=options.device).model_dump()
                    share = made["quantized"] / made["parameters"]
                    model = cls.from_pretrained(
                        source, quantization_config=bnb_config(method), device_map={"": options.device}
                    )
                    model.save_pretrained(theirs)
                    cells.append(difference(mine, theirs))
                except Exception as error:  # one architecture that fails must not hide the others
                    cells.append(f"{type(error).__name__}: {str(error)[:80]}")
            stored = f"{dtype}{', sharded' if sharded else ''}"
            print(f"| {name} | {stored} | {share:.3f} | {' | '.join(cells)} |", flush=True)
            counts.update(cells)
    print(f"\n{counts.total()} cells: {', '.join(f'{count} {cell}' for cell, count in counts.most_common())}")


def difference(mine: Path, theirs: Path) -> str:
    """`file` or `tensors` when they are the same, else what is not."""
    from safetensors.torch import load_file

    one, other = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (mine, theirs))
    if one != other:
        return "config differs"
    a, b = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()} for folder in (mine, theirs)
    )
    if a.keys() != b.keys():
        return f"names differ: {sorted(a.keys() ^ b.keys())[0]}"
    for name in a:
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            return f"{name} {a[name].dtype} {tuple(a[name].shape)}, not {b[name].dtype} {tuple(b[name].shape)}"
        if raw(a[name]) != raw(b[name]):
            return f"{name} has other bytes"
    files = [folder / "model.safetensors" for folder in (mine, theirs)]
    same = all(file.exists() for file in files) and files[0].read_bytes() == files[1].read_bytes()
    return "file" if same else "tensors"


def raw(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def variant_of(method: str) -> Any:
    from configs.schema import Variant

    compute = None if method == "int8" else "float32"  # what transformers writes when it is not told
    return Variant(method=method.removesuffix("-dq"), double_quant=method.endswith("-dq"), compute_dtype=compute)


def bnb_config(method: str) -> Any:
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, double = method.removesuffix("-dq"), method.endswith("-dq")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)


def disk_speed(source: Path, work: Path) -> tuple[float, float]:
    """Bytes a second: reading the model's files once they are in the page cache, and writing a new file; four threads."""
    files = sorted(source.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    piece = 1 << 24
    spans = [(path, at) for path in files for at in range(0, path.stat().st_size, piece)]
    buffers = [bytearray(piece) for _ in range(4)]

    def read(number: int) -> None:
        for path, at in spans[number::4]:
            file = os.open(path, os.O_RDONLY)
            os.preadv(file, [buffers[number]], at)
            os.close(file)

    def write(number: int) -> None:
        for at in range(number * piece, 1 << 30, 4 * piece):
            os.pwrite(target, buffers[number], at)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
        started = time.perf_counter()
        list(pool.map(read, range(4)))
        reading = size / (time.perf_counter() - started)
        target = os.open(work / "speed", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        started = time.perf_counter()
        list(pool.map(write, range(4)))
        writing = (1 << 30) / (time.perf_counter() - started)
    os.close(target)
    (work / "speed").unlink()
    return reading, writing


def make_model(work: Path, name: str) -> Path:
    """A folder with random bf16 weights of the model's shapes, made once."""
    import numpy as np

    config, limit = MODELS[name]
    folder = work / name
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(exist_ok=True)
    hidden, inter, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": [q, hidden], "self_attn.k_proj": [kv, hidden], "self_attn.v_proj": [kv, hidden],
            "self_attn.o_proj": [hidden, q], "self_attn.q_norm": [head], "self_attn.k_norm": [head],
            "mlp.gate_proj": [inter, hidden], "mlp.up_proj": [inter, hidden], "mlp.down_proj": [hidden, inter],
            "input_layernorm": [hidden], "post_attention_layernorm": [hidden],
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{key}.weight": shape for key, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [config["vocab_size"], hidden]
    groups: list[dict[str, list[int]]] = [{}]
    size = 0
    for key, shape in shapes.items():
        if size + 2 * int(np.prod(shape)) > limit and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][key] = shape
        size += 2 * int(np.prod(shape))
    pool = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    bits = (pool.view(np.uint32) >> 16).astype(np.uint16)
    placed = {}
    for number, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in group.items():
            placed[key] = file
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * int(np.prod(shape))]}
            end = header[key]["data_offsets"][1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for at in range(0, end, bits.nbytes):
                rolled = np.roll(bits, 977 * (at // bits.nbytes + 131 * number))
                opened.write(rolled.tobytes()[: end - at])
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
