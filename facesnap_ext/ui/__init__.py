"""The page and the HTTP API: the accordion, the panel of model files, and the routes."""
