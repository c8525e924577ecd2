"""The extension's commands: one module each, which defines the arguments and `run`."""
