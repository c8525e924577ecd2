"""The methods that the paper's Table 1 compares FaceSnap with, trained by the same trainer on the same data."""
