"""Runs in a runtime's own environment and knows nothing of tame: opens a checkpoint, answers greedily, and scores tokens.

    python probe.py vllm|transformers REQUEST ANSWER

REQUEST is JSON: {model: folder, trust_remote_code, prompts: [[token]], continuations: [[token]]}. ANSWER is JSON: {error} in
one line; or {device, greedy: [[token]] after each prompt, as many as its continuation has, logprobs: [[float]] of each token
of prompt + continuation but the first, given all before it, in nats}.
"""

import json
import sys
from pathlib import Path
from typing import Any


def vllm(request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of the checkpoint."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    pairs = list(zip(request["prompts"], request["continuations"], strict=True))
    llm = LLM(
        model=request["model"],
        trust_remote_code=request["trust_remote_code"],
        max_model_len=max(len(prompt) + len(continuation) for prompt, continuation in pairs) + 1,
        max_num_seqs=len(pairs),
        enforce_eager=True,
        seed=0,
        # Little is kept of four short prompts; others may use the rest of a GPU. vLLM refuses to start where less is free.
        **({"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 1 << 30} if current_platform.is_cuda() else {}),
    )
    plain: dict[str, Any] = {"temperature": 0.0, "detokenize": False}
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in pairs],
        [SamplingParams(max_tokens=len(given), ignore_eos=True, **plain) for _, given in pairs],
        use_tqdm=False,
    )
    scored = llm.generate(
        [{"prompt_token_ids": prompt + continuation} for prompt, continuation in pairs],
        SamplingParams(max_tokens=1, prompt_logprobs=0, **plain),
        use_tqdm=False,
    )
    return {
        "device": current_platform.get_device_name(),
        "greedy": [list(answer.outputs[0].token_ids) for answer in answers],
        "logprobs": [
            [
                entry[token].logprob
                for token, entry in zip(one.prompt_token_ids[1:], one.prompt_logprobs[1:], strict=True)
            ]
            for one in scored
        ],
    }


def transformers(request: dict[str, Any]) -> dict[str, Any]:
    """What transformers, of whatever version, makes of the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype="auto", device_map=device, trust_remote_code=request["trust_remote_code"]
    ).eval()
    greedy, logprobs = [], []
    for prompt, continuation in zip(request["prompts"], request["continuations"], strict=True):
        begin = torch.tensor([prompt], device=device)
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=len(continuation), pad_token_id=0)
        with torch.inference_mode():
            made = model.generate(begin, attention_mask=torch.ones_like(begin))[0, len(prompt) :]
            ids = torch.tensor([prompt + continuation], device=device)
            scores = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        greedy.append(made.tolist())
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "greedy": greedy, "logprobs": logprobs}


def main(runtime: str, asked: Path, answered: Path) -> None:
    """Answer a request, or say in a line why not."""
    try:
        answer = {"vllm": vllm, "transformers": transformers}[runtime](json.loads(asked.read_text()))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    answered.write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
