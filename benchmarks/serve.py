"""Which formats vLLM opens, and what it computes of them: `python -m benchmarks.serve FOLDER`, where vLLM is (`make vllm`).

Random models of two layers, of architectures with experts and without, are written in each format, and `tame serve-check` is
run on every checkpoint, as people run it. `--model` takes a real model in their place. The tables are in RESULTS.md.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.schema import Variant
from tasks.quantize.methods import method_of, method_of_source
from tasks.quantize.protocols import Request
from tasks.runtime.device import pick
from tests.models import tiny

_SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
}
_HEADS = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.06}
_EXPERTS = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", _HEADS),
    "llama-tied": ("LlamaConfig", {**_HEADS, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_HEADS, **_EXPERTS, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {**_HEADS, "num_local_experts": 8}),
    "granite-moe": ("GraniteMoeConfig", {**_HEADS, "num_local_experts": 8}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_HEADS, **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 128, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128, "v_head_dim": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {**_HEADS, "num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128},
    ),
}  # fmt: skip
FORMATS: tuple[dict[str, Any], ...] = (
    {"method": "nf4"}, {"method": "int8"}, {"method": "w4a16", "group_size": 64}, {"method": "w8a16"}, {"method": "w8a8"},
    {"method": "fp8"}, {"method": "fp8-block"}, {"method": "mxfp4"}, {"method": "nvfp4"},
)  # fmt: skip
HEADER = (
    "| model | format | | mean difference, nats (transformers in 16 bits) | largest | tokens before the first other |"
)


def checked(options: argparse.Namespace, folder: Path) -> str:
    """What `tame serve-check` says of a checkpoint, as cells of the table."""
    command = [sys.executable, "-m", "tame", "serve-check", str(folder), "--json", "--device", options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    try:
        (found,) = json.loads(done.stdout)
    except ValueError:
        return f"{' '.join((done.stderr or done.stdout).split())[-300:]} | | | |"
    if not found["opened"] or found["error"]:
        return f"{found['error']} | | | |"
    rounding = "" if found["rounding"] is None else f" ({found['rounding']:.3f})"
    agrees = "agrees" if found["agrees"] else "**computes something else**"
    return f"{agrees} | {found['difference']:.3f}{rounding} | {found['largest']:.3f} | {found['same']} of {found['answered']} |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models and checkpoints are made")
    parser.add_argument("--model", type=Path, help="a folder with a real model, in the place of the random ones")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=tuple(SHAPES), metavar="SHAPE")
    parser.add_argument("--formats", nargs="+", default=[one["method"] for one in FORMATS], metavar="METHOD")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--jobs", type=int, default=1, help="checkpoints that are opened at once; a GPU has room for several"
    )
    options = parser.parse_args()
    options.device = pick(options.device)
    import transformers

    made: list[tuple[str, str, Path]] = []
    sources = {options.model.name: options.model} if options.model else {}
    for name in [] if options.model else options.shapes:
        kind, values = SHAPES[name]
        ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        sources[name] = tiny(options.folder / name, getattr(transformers, kind)(**values, **ids))
    for name, source in sources.items():
        made.append((name, "original", source))
        for wanted in FORMATS:
            if wanted["method"] not in options.formats:
                continue
            variant, out = Variant(**wanted), options.folder / f"{name}-{wanted['method']}"
            out.mkdir()
            request = Request(source, out, variant, options.device, source_method=method_of_source(source))
            try:
                method_of(variant).quantize(request)
            except Exception as error:  # a format that this architecture does not have is a row, too
                print(
                    f"| {name} | {variant.label} | not written: {' '.join(str(error).split())[:200]} | | | |",
                    flush=True,
                )
                continue
            made.append((name, variant.label, out))
    print(f"{HEADER}\n| --- | --- | --- | ---: | ---: | ---: |", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for (name, label, _), cells in zip(made, pool.map(lambda one: checked(options, one[2]), made), strict=True):
            print(f"| {name} | {label} | {cells}", flush=True)


if __name__ == "__main__":
    main()
