"""The cost of FaceSnap compared with plain SDXL and with other ways to condition it."""
