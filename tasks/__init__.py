"""The stages, in the order the data meets them: download, quantize, evaluate, gate, track, report, publish."""
