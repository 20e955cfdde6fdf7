"""A peer's 4-bit at about equal bits, calibrated on the same tokens: llm-compressor's GPTQ, or auto-round.

    python benchmarks/calibrate_peers.py MODEL IDS OUT [--peer gptq|auto-round] [--group-size 64] [--observer mse]

MODEL is a folder, IDS the `ids.safetensors` in the folder that `formats.py table` and `calibrate.py quality` print, OUT a
new folder, which `tame evaluate` opens. This file imports nothing of tame's; the environment needs llmcompressor 0.14 and what
it asks for, or auto-round 0.15: an environment of its own.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantize, and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("out")
    parser.add_argument("--peer", choices=("gptq", "auto-round"), default="gptq")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", help="of gptq: how a scale is found: the library's default, or mse")
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round; 200 is its default")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    from safetensors.torch import load_file

    ids = load_file(options.ids)["ids"].long()
    started = time.monotonic()
    {"gptq": gptq, "auto-round": auto_round}[options.peer](options, ids)
    seconds = time.monotonic() - started
    size = sum(path.stat().st_size for path in Path(options.out).rglob("*.safetensors"))
    found = {"peer": options.peer, "group_size": options.group_size, "observer": options.observer}
    print(json.dumps({**found, "seconds": round(seconds, 1), "bytes": size}), flush=True)


def gptq(options: argparse.Namespace, ids: Any) -> None:
    """llm-compressor's GPTQ, W4A16, symmetric; its defaults but for the group size and the observer."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{"input_ids": row, "attention_mask": row.new_ones(len(row))} for row in ids]
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = options.group_size
    if options.observer:
        scheme.weights.observer = options.observer
    # Many CPUs are slow in bf16.
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, device_map={"": options.device})
    oneshot(
        model=model,
        dataset=DataLoader(rows, batch_size=1),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(options.out, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


def auto_round(options: argparse.Namespace, ids: Any) -> None:
    """auto-round's W4A16, symmetric; its defaults but for the group size and the text."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = "float32" if options.device == "cpu" else "bfloat16"
    made = AutoRound(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype),
        AutoTokenizer.from_pretrained(options.model),
        scheme="W4A16",
        group_size=options.group_size,
        dataset=list(ids.split(8)),
        iters=options.iterations,
        seqlen=ids.shape[1],
        nsamples=len(ids),
        device_map=options.device,
    )
    made.quantize_and_save(options.out, format="llm_compressor")


if __name__ == "__main__":
    main()
