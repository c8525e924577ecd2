"""The Landmark Predictor: DECA, FLAME, the open face model, the 72 facial landmarks and the landmark image."""
