"""The accordion, the panel of model files, and the HTTP routes."""
