"""One module per family of pretrained models; ``load(source)`` in each of them returns a denoiser."""
