"""The extension's commands: one module each, with its arguments beside its `run`."""
