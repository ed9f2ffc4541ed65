"""Decoding: from a denoiser, with or without a circuit, to text."""
