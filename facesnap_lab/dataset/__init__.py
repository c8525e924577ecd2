"""Full-size training data: from folders of photos to the shards that `facesnap train` reads."""
