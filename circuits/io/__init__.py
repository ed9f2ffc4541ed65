"""Saving and loading compiled circuits, in folders and on the Hugging Face hub."""

from circuits.io.saving import STRUCTURE_FILE, WEIGHTS_FILE, load, save

__all__ = ["STRUCTURE_FILE", "WEIGHTS_FILE", "load", "save"]
