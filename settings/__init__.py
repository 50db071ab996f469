"""What params.yaml may hold: every key with its type, bounds and description."""
