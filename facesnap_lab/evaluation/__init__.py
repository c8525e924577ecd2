"""Measuring FaceSnap."""
