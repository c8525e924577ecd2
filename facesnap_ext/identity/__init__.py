"""Identity features of reference photos: face detection, ArcFace embeddings, CLIP tokens, saved identities."""
