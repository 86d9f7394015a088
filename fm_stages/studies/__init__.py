"""What a person runs on models and data beside training."""
