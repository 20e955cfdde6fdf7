"""A realistic result: one variant published, one rejected, one failed. For the tests of report, card and MLflow."""

import json
from pathlib import Path

from configs.schema import Gate, Recipe
from tasks.gate import judge
from tasks.result import Measured, Result, ResultArtifact, ResultSource, ResultVariant

RECIPE = {
    "name": "smollm2-135m",
    "source": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "main"},
    "variants": [
        {"method": "int8"},
        {"method": "nf4", "double_quant": True},
        {"method": "fp4", "compute_dtype": "float16", "skip_modules": ["model.layers.0"]},
    ],
    "evaluate": {"text": {"builtin": "python-docs"}, "window": 512, "max_tokens": 4096, "tasks": ["piqa"]},
    "gate": {"max_mean_kl": 0.1, "min_top1_agreement": 0.9},
    "publish": {"to": "hub", "repo": "me/{model}-{variant}"},
}
PROTOCOL = {
    "device": "cpu",
    "text": {"name": "python-docs of CPython 3.11.9", "revision": None, "sha256": "5d" * 32},
    "windows": 8,
    "window": 512,
    "tokens_scored": 4088,
    "special_tokens": "none",
    "batch_size": 8,
    "dtype": "bfloat16",
    "weights": "as stored",
    "floor": {"kl_mean": 2.1e-05, "top1_agreement": 0.9995, "batch_size": 1},
    "speed": {"prompt_tokens": 512, "new_tokens": 64, "repeats": 3, "batch_size": 1, "threads": 2},
}
BASELINE = {
    "size_bytes": 269060552.0,
    "bits_per_weight": 16.0,
    "perplexity": 19.44812,
    "perplexity_low": 18.1,
    "perplexity_high": 20.9,
    "floor_kl_mean": 2.1e-05,
    "floor_top1_agreement": 0.9995,
    "load_seconds": 0.61,
    "peak_memory_bytes": 712345600.0,
    "time_to_first_token_seconds": 0.284,
    "prefill_tokens_per_second": 1809.4,
    "decode_tokens_per_second": 21.37,
    "task/piqa/acc": 0.665,
    "task/piqa/acc_low": 0.6,
    "task/piqa/acc_high": 0.73,
    "task/piqa/items": 200.0,
    "task/piqa/floor_flips": 0.01,
}
INT8 = {
    "size_bytes": 163557634.0,
    "bits_per_weight": 9.73,
    "quantized_share": 0.78946,
    "perplexity": 19.72341,
    "perplexity_low": 18.4,
    "perplexity_high": 21.2,
    "perplexity_ratio": 1.01416,
    "perplexity_ratio_low": 1.0102,
    "perplexity_ratio_high": 1.0181,
    "kl_mean": 0.018931,
    "kl_mean_low": 0.0171,
    "kl_mean_high": 0.0209,
    "kl_median": 0.00912,
    "kl_p99": 0.1477,
    "kl_max": 1.204,
    "weight_error_mean": 0.008512,
    "weight_error_max": 0.011873,
    "top1_agreement": 0.92711,
    "top1_agreement_low": 0.918,
    "top1_agreement_high": 0.9362,
    "load_seconds": 1.12,
    "peak_memory_bytes": 601234432.0,
    "time_to_first_token_seconds": 1.121,
    "prefill_tokens_per_second": 457.2,
    "decode_tokens_per_second": 9.874,
    "task/piqa/acc": 0.66,
    "task/piqa/acc_low": 0.594,
    "task/piqa/acc_high": 0.725,
    "task/piqa/items": 200.0,
    "task/piqa/acc_difference": -0.005,
    "task/piqa/acc_difference_low": -0.02,
    "task/piqa/acc_difference_high": 0.01,
    "task/piqa/acc_p": 1.0,
    "task/piqa/flips": 3.0,
}
NF4 = {
    "size_bytes": 111879761.0,
    "bits_per_weight": 6.65,
    "quantized_share": 0.78946,
    "perplexity": 25.69812,
    "perplexity_low": 24.1,
    "perplexity_high": 27.5,
    "perplexity_ratio": 1.32137,
    "perplexity_ratio_low": 1.301,
    "perplexity_ratio_high": 1.342,
    "kl_mean": 0.261601,
    "kl_mean_low": 0.2498,
    "kl_mean_high": 0.2741,
    "kl_median": 0.1433,
    "kl_p99": 1.702,
    "kl_max": 6.11,
    "weight_error_mean": 0.093873,
    "weight_error_max": 0.101865,
    "top1_agreement": 0.72034,
    "top1_agreement_low": 0.703,
    "top1_agreement_high": 0.737,
    "load_seconds": 1.41,
    "peak_memory_bytes": 523456512.0,
    "time_to_first_token_seconds": 1.087,
    "prefill_tokens_per_second": 471.9,
    "decode_tokens_per_second": 12.06,
    "task/piqa/acc": 0.635,
    "task/piqa/acc_low": 0.568,
    "task/piqa/acc_high": 0.702,
    "task/piqa/items": 200.0,
    "task/piqa/acc_difference": -0.03,
    "task/piqa/acc_difference_low": -0.0723,
    "task/piqa/acc_difference_high": 0.0123,
    "task/piqa/acc_p": 0.2101,
    "task/piqa/flips": 18.0,
}
LEFT = [
    {"module": "model.embed_tokens", "tensors": 1, "parameters": 28311552, "reason": "embedding"},
    {"module": "lm_head", "tensors": 0, "parameters": 0, "reason": "tied to model.embed_tokens"},
    {"module": "model.layers.*.input_layernorm", "tensors": 30, "parameters": 17280, "reason": "norm"},
]


def evidence(folder: Path, scale: float) -> Path:
    """An evaluation artifact's folder, as tasks/evaluate writes it: eight windows, twenty answers."""
    folder.mkdir(parents=True, exist_ok=True)
    windows = [
        {"loss": 2.9 + 0.05 * i + scale / 4} | ({"kl": scale * (0.8 + 0.05 * i)} if scale else {}) for i in range(8)
    ]
    (folder / "windows.json").write_text(json.dumps(windows))
    (folder / "tasks").mkdir(exist_ok=True)
    wrong = range(int(40 * scale))  # the baseline has all right
    items = [{"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": float(i not in wrong)} for i in range(20)]
    (folder / "tasks" / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    if scale:
        kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
        kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        layers = [
            {
                "module": f"model.layers.{depth}.{kind}",
                "error": scale**0.5 * (0.17 + 0.004 * i + 0.02 / (1 + depth + i)),
                "parameters": 331776,
            }
            for depth in range(30)
            for i, kind in enumerate(kinds)
        ]
        (folder / "layers.json").write_text(json.dumps(layers))
        shown = [
            {
                "doc_id": i,
                "lost": True,
                "question": f"Question: How do you open jar number {i} <without> tools?\nAnswer:",
                "right": "Turn the lid anticlockwise.",
                "baseline": "Turn the lid anticlockwise.",
                "variant": "Turn the jar anticlockwise, and hold the lid & the table.",
            }
            for i in list(wrong)[:10]
        ]
        (folder / "flips.json").write_text(json.dumps({"piqa": shown}))
    return folder


def samples(answer: str) -> list[dict[str, object]]:
    baseline = " Paris, a city on the Seine. It has been the capital since 987."
    same = next((i for i, (a, b) in enumerate(zip(answer, baseline, strict=False)) if a != b), None)
    hostile = " 4\n<script>alert(1)</script>"
    return [
        {"prompt": "The capital of France is", "baseline": baseline, "answer": answer, "diverges_at": same},
        {"prompt": "<b>2 & 2</b> =", "baseline": hostile, "answer": hostile, "diverges_at": None},
    ]


def make(folder: Path | None = None, repo: str = "https://huggingface.co/me/SmolLM2-135M-Instruct") -> Result:
    """The result; with `folder`, evidence of the evaluations is written there."""
    place = {
        name: str(evidence(folder / name, kl)) if folder else None
        for name, kl in (("baseline", 0.0), ("int8", 0.0189), ("nf4-dq", 0.2616))
    }
    recipe = Recipe.model_validate(RECIPE)
    spec = recipe.variants
    limits = Gate(max_mean_kl=0.1, min_top1_agreement=0.9)

    def artifact(name: str, size: float) -> ResultArtifact:
        files = {"model.safetensors": name[:1].encode().hex() * 32, "config.json": "ab" * 32}
        return ResultArtifact(
            path=f"/tmp/tame/{name}", digest=name[:1].encode().hex() * 32, bytes=int(size), files=files
        )

    variants = [
        ResultVariant(
            name="int8",
            status="published",
            spec=spec[0],
            metrics=INT8,
            protocol=PROTOCOL,
            notes=["int8 also quantizes activations: its numbers depend on what shares a batch."],
            samples=samples(" Paris, a city on the Seine. It is also the largest city."),
            evidence=place["int8"],
            cached=["quantize"],
            gate=judge(INT8, limits),
            artifact=artifact("int8", 163600000),
            left=LEFT,
            published=f"{repo}-int8/commit/{'c' * 40}",
        ),
        ResultVariant(
            name="nf4-dq",
            status="rejected",
            spec=spec[1],
            metrics=NF4,
            protocol=PROTOCOL,
            notes=["Perplexity and divergence were measured on weights dequantized to bfloat16."],
            samples=samples(" Lyon."),
            evidence=place["nf4-dq"],
            gate=judge(NF4, limits),
            artifact=artifact("nf4-dq", 111900000),
            left=LEFT,
        ),
        ResultVariant(
            name="fp4",
            status="failed",
            spec=spec[2],
            error="evaluate fp4: the process was killed (signal 9), probably for memory; lower evaluate.batch_size",
        ),
    ]
    return Result(
        recipe=recipe,
        source=ResultSource(
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            revision="main",
            commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
            digest="d1" * 32,
            files={"model.safetensors": "e2" * 32, "config.json": "f3" * 32},
            licence="apache-2.0",
        ),
        baseline=Measured(name="baseline", metrics=BASELINE, protocol=PROTOCOL, evidence=place["baseline"]),
        variants=variants,
        versions={
            "python": "3.11.9",
            "tame": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.24.0",
            "bitsandbytes": "0.50.2",
        },
        hardware={"device": "cpu", "cpu": "Intel Xeon", "cores": 2, "memory_bytes": 8 * 2**30, "gpus": []},
        started="2026-11-23T18:00:00+00:00",
        seconds=187.4,
        prefect_run="0f9f4c1e-8b1f-4b2e-9a51-3f6f3a0d8c11",
    )
