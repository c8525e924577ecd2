"""The miniature's second edition: people who change their look, at 128 pixels.

It will replace the first edition when it is complete.

`world` and `render` create the people, and `dataset` the training images. `loop` is the training loop of every stage,
`vae` the first network, and `gates` its quality gates. `train` is the command that runs or resumes any stage.
"""
