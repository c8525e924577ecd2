"""Training of the Mixer and FFRNet, as in section 2.2 of the FaceSnap paper."""
