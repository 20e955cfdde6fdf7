"""What quantization did to a model: perplexity, divergence from the baseline, tasks, speed and memory."""
