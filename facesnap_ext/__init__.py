"""FaceSnap: portraits of a person from one photo, on any SDXL checkpoint, without fine-tuning."""

__version__ = "0.1.0"
