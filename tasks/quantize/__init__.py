"""From a checkpoint in 16 or 32 bits to a quantized one, tensor by tensor."""
