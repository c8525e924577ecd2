"""FaceSnap's lab: data sets, training, the miniature world, evaluation, ablations and benchmarks."""
