"""Training data at full size: from folders of photos to the shards that `facesnap train` reads."""
