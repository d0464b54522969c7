"""Measurements: speed, memory, kernels, and what each departure from the paper is worth."""
