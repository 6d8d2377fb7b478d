"""Quantization: affine arithmetic, ranges, placement on the exported graph, the quantize steps."""
