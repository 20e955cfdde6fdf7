"""From a 16- or 32-bit checkpoint to a bitsandbytes one, tensor by tensor."""
