"""Memory and seconds of merging a LoRA adapter into its base: `python -m benchmarks.adapter --model 8b [--work DIR]`.

The base has random weights in the shapes of `benchmarks.quantize`; the adapter is of rank 16 on every linear layer. The merge is a
process of its own; memory is the peak of its proportional set size, which has the pages of files that it maps, less that of a
model of a few megabytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.quantize import MODELS, Memory, make_model

RANK = 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MERGE = (
    "import sys; from pathlib import Path; from tasks.download.adapter_merge import merge; "
    "merge(*map(Path, sys.argv[1:]), ['config.json'])"
)


def main() -> None:
    """Merge into a tiny model and into the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--work", type=Path, help="where the models lie; a folder that is removed by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        floor, _ = merged(work, "tiny")
        peak, seconds = merged(work, options.model)
    largest = 2 * MODELS[options.model][0]["vocab_size"] * MODELS[options.model][0]["hidden_size"] / 1e6
    print(
        f"{options.model}: {seconds:.0f} s, {(peak - floor) / 1e6:.0f} MB above imports; its largest tensor has {largest:.0f} MB"
    )


def merged(work: Path, name: str) -> tuple[int, float]:
    """Peak of the memory in bytes, and seconds, of merging an adapter into the model `name`."""
    base = make_model(work, name)
    adapter, out = made_adapter(base, work / f"{name}-adapter"), work / f"{name}-merged"
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", MERGE, str(base), str(adapter), str(out)])
    memory = Memory(process.pid)
    code = process.wait()
    memory.stop()
    if code:
        raise SystemExit(f"the merge ended with exit code {code}")
    return memory.peak, time.monotonic() - began


def made_adapter(base: Path, folder: Path) -> Path:
    """An adapter of rank RANK with random weights, on every linear layer of `base`."""
    import torch
    from safetensors.torch import save_file

    from tasks.download.checkpoint import read_tensors

    if folder.exists():
        return folder
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, stored in read_tensors(base).items():
        module = name.removesuffix(".weight")
        if module.endswith(LINEAR):
            rows, columns = stored.shape
            for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = (
                    torch.randn(*shape, generator=generator) / 100
                )
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(LINEAR)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
