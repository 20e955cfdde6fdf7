"""Whether what was published can be loaded, without its weights. Runs in a process of its own: it imports torch."""

import json
from pathlib import Path


def loads(folder: str) -> str | None:
    """Read configuration and tokenizer from `folder` and build the model on the meta device: what went wrong, or None.

    A model whose code lies in its own repo is not built: that code is not run here.
    """
    config = json.loads((Path(folder) / "config.json").read_bytes())
    if "auto_map" in config or not config.get("model_type"):
        return None
    import torch
    from transformers import AutoTokenizer, logging

    from tasks.transformers_adapter import model_class, read_model_config

    logging.set_verbosity_error()
    try:
        config_of_model = read_model_config(Path(folder), trust_remote_code=False)
        with torch.device("meta"):
            model_class(config_of_model, Path(folder), trust_remote_code=False)._from_config(config_of_model)
        if (Path(folder) / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    return None
