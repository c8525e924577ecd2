"""FaceSnap at miniature size: small networks with which every code path runs on a machine that has no other."""
