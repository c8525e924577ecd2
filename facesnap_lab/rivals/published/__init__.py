"""Weights that the authors of the rivals have published, applied to a diffusers pipeline as their code does."""
