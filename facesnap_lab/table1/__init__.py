"""The paper's Table 1 in the miniature: FaceSnap and its rivals, trained on equal terms and measured together."""
