"""FaceSnap at miniature size: a procedural world of people, every network trained on it, and what measures them.

`world`, `render`, `captions` and `dataset` make the world; `identity`, `face_detector`, `regressor`, `clip_pair`,
`vae`, `base_model`, `distil`, `shards` and `start` train (docs/training.md); `shipped`, `measure`, `demo` and `export`
use what came of it. `stand_ins` are untrained networks in real formats, for tests.
"""
