"""Training: the forward process, a denoiser's logits on disk, and the fitting of denoisers and circuits."""
