"""The `facesnap` command."""
