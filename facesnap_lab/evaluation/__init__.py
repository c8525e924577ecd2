"""Evaluation of FaceSnap and other methods with the metrics of the paper's Table 1."""
