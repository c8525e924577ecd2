"""The Landmark Predictor: DECA, FLAME, the 72 points and their drawing."""
