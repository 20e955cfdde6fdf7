"""The smallest mix of quantized and unquantized modules that keeps a limit, found by measuring."""
