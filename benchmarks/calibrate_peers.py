"""A peer's 4-bit at about equal bits, calibrated on the same tokens: llm-compressor's GPTQ, in an environment of its own.

    python benchmarks/calibrate_peers.py MODEL IDS OUT [--group-size 64] [--observer mse]

MODEL is a folder, IDS the `ids.safetensors` that `benchmarks/calibrate.py quality` prints the folder of, OUT a new folder, which
`tame evaluate` opens. This file imports nothing of tame's; the environment needs llmcompressor 0.14 and what it asks for.
"""

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    """Quantize, and print how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--observer", help="how a scale is found: the library's default, or mse")
    options = parser.parse_args()

    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = load_file(options.ids)["ids"].tolist()
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.group_size = options.group_size
    if options.observer:
        scheme.weights.observer = options.observer
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")  # many CPUs are slow in bf16
    started = time.monotonic()
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    seconds = time.monotonic() - started
    model.save_pretrained(options.out, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)
    size = sum(path.stat().st_size for path in Path(options.out).glob("*.safetensors"))
    print(json.dumps({"group_size": options.group_size, "seconds": round(seconds, 1), "bytes": size}))


if __name__ == "__main__":
    main()
