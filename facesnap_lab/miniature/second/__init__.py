"""The miniature's second edition: people who change their look, at 128 pixels.

It will replace the first edition when it is complete.

`world` and `render` create the people, and `dataset` the training images. `loop` is the training loop of every stage.
`vae`, `identity` (the recognition network and three judges), `clip_pair`, `detector` and `deca` are the networks.
`details` has the words of CLIP's captions. `gates`, `gates_identity` and `probes` measure whether a network is good
enough for the next one to be trained. `base`, `lightning` and `facesnap` train the UNets and FaceSnap, and `measure`
measures FaceSnap. `train` runs or resumes one stage, `everything` runs all of them, and `pack` packs their results.
"""
