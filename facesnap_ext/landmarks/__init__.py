"""The Landmark Predictor: DECA, FLAME, the 72 facial landmarks and the landmark image."""
