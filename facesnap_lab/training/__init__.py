"""Training of Mixer and FFRNet after the FaceSnap paper, section 2.2."""
