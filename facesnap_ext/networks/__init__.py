"""The networks: Facial Attribute Mixer, FFRNet, and InstantID's Resampler and adapter."""
