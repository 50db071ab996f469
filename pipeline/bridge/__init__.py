"""What is trained and what for: heads around a frozen language model, losses, checkpoints."""
