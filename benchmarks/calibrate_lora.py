"""Whether a LoRA on a 4-bit checkpoint learns: `python benchmarks/calibrate_lora.py FOLDER TEXT`, where PEFT is installed.

It opens the folder in plain transformers, puts a LoRA on all linear layers with PEFT, trains on one batch of the text, and prints
the loss before each step. This file imports nothing of tame's.
"""

import argparse
from pathlib import Path


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()

    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = AutoTokenizer.from_pretrained(options.folder)(Path(options.text).read_text(encoding="utf-8"))["input_ids"][
        :512
    ]
    batch = torch.tensor(ids).view(4, -1)
    adam = torch.optim.Adam((one for one in model.parameters() if one.requires_grad), lr=1e-3)
    for step in range(options.steps + 1):
        loss = model(input_ids=batch, labels=batch).loss
        print(f"step {step}: loss {loss.item():.4f}", flush=True)
        adam.zero_grad()
        loss.backward()
        adam.step()


if __name__ == "__main__":
    main()
