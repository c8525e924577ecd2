"""What FaceSnap costs beside plain SDXL and other ways to condition it."""
