"""FaceSnap's laboratory: data sets, training, the miniature world, evaluation, ablations and benchmarks."""
