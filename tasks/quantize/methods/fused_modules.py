"""The modules that vLLM computes as one: all of their parts must be quantized, or none, or it refuses the checkpoint."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""What vLLM calls them, and their parts (`packed_modules_mapping` of its models)."""


def computed_with(module: str) -> list[str]:
    """The modules that vLLM computes as one with this one, which is not among them."""
    parent, _, name = module.rpartition(".")
    parts = next((parts for parts in FUSED.values() if name in parts), ())
    return [f"{parent}.{part}" for part in parts if part != name]
