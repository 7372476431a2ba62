"""Quantising a model: rounding to nearest, AWQ, GPTQ; block by block."""
