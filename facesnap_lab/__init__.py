"""FaceSnap's laboratory: data sets, training, evaluation, the miniature world and benchmarks."""
