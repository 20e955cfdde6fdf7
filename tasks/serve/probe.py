"""Runs in a runtime's own environment and knows nothing of tame: opens a checkpoint, answers greedily, scores tokens, and trains.

    python probe.py vllm|transformers|peft REQUEST ANSWER

REQUEST is JSON: {model: folder, trust_remote_code, prompts: [[token]], continuations: [[token]]}, and for peft also lora: {rank,
rate, steps}. ANSWER is JSON: {device, greedy: [[token]] after each prompt, as many as its continuation has, logprobs: [[float]] of
each token of prompt + continuation but the first, given all before it, in nats}, and of peft also {losses: [float] before each
step and after the last, in nats a token}. It has {error}, in one line, in place of what could not be had.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

IGNORED = -100
"""The label of padding, which torch leaves out of a loss."""


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
    from transformers import GenerationConfig

    model = _opened(request).eval()
    greedy, logprobs = [], []
    for prompt, continuation in zip(request["prompts"], request["continuations"], strict=True):
        begin = torch.tensor([prompt], device=model.device)
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=len(continuation), pad_token_id=0)
        with torch.inference_mode():
            made = model.generate(begin, attention_mask=torch.ones_like(begin))[0, len(prompt) :]
            ids = torch.tensor([prompt + continuation], device=model.device)
            scores = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
        greedy.append(made.tolist())
        logprobs.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    return {"device": name, "greedy": greedy, "logprobs": logprobs}


def peft(request: dict[str, Any]) -> dict[str, Any]:
    """How the loss falls while a LoRA on all linear layers is trained on the prompts and their continuations."""
    import torch

    gc.collect()  # the model that has answered
    model, stopped = _with_lora(request), list[Any]()

    def look(layer: Any, given: Any, made: Any) -> None:
        if given[0].requires_grad and not made.requires_grad:
            stopped.append(layer)

    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.base_layer.register_forward_hook(look)
    texts = [prompt + given for prompt, given in zip(request["prompts"], request["continuations"], strict=True)]
    ids, known = torch.zeros(2, len(texts), max(map(len, texts)), dtype=torch.long, device=model.device)
    for row, text in enumerate(texts):
        ids[row, : len(text)], known[row, : len(text)] = torch.tensor(text), 1
    labels = ids.masked_fill(known == 0, IGNORED)
    steps, rate = request["lora"]["steps"], request["lora"]["rate"]
    adam = torch.optim.Adam((each for each in model.parameters() if each.requires_grad), lr=rate)
    losses = []
    for step in range(steps + 1):
        torch.manual_seed(0)  # so that dropout, where a model has it, is the same at each step
        logits = model(input_ids=ids, attention_mask=known).logits[:, :-1].float()
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        losses.append(loss.item())
        if stopped:  # the loss falls, but what is below such a layer learns only around it
            return {"error": f"no gradient passes through {len(stopped)} of its layers"}
        if step < steps:
            loss.backward()
            adam.step()
            adam.zero_grad()
    return {"losses": losses}


def _with_lora(request: dict[str, Any]) -> Any:
    """The checkpoint with a LoRA that changes nothing yet, the same each time, ready to be trained."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    # Opened again: CPUs with AVX512-BF16 pack 4-bit weights for answers, and what is packed has no gradient.
    model = _opened(request)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
        for layer in model.modules() if model.device.type == "cpu" else ():
            if getattr(layer, "compute_dtype", None):
                layer.compute_dtype = torch.float32  # CPUs without products of bfloat16 take seven times as long for it
    torch.manual_seed(0)
    rank = request["lora"]["rank"]
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def _opened(request: dict[str, Any]) -> Any:
    """The checkpoint in transformers, in the dtypes that it is stored in, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        request["model"], dtype="auto", device_map=device, trust_remote_code=request["trust_remote_code"]
    )


PARTS = {"vllm": (vllm,), "transformers": (transformers,), "peft": (transformers, peft)}


def main(runtime: str, asked: Path, answered: Path) -> None:
    """Answer a request, or say in a line why not."""
    request, answer = json.loads(asked.read_text()), dict[str, Any]()
    for part in PARTS[runtime]:
        try:
            answer |= part(request)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        answered.write_text(json.dumps(answer))  # also what is known before the next part, which may crash
        if "error" in answer:
            return


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
