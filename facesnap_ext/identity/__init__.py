"""Reference photos to identity features: faces, ArcFace, CLIP, saved identities."""
