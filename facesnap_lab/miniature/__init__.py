"""The miniature: a procedural world of people, every network of FaceSnap trained on it at tiny sizes, and measurements.

`world`, `render`, `captions` and `dataset` create the world. `identity`, `face_detector`, `regressor`, `clip_pair`,
`vae`, `base_model`, `distil`, `shards` and `start` train the networks (docs/training.md). `shipped` loads the trained
ones; `measure`, `trade_offs`, `sizes`, `tokens`, `demo` and `export` use them.
"""
