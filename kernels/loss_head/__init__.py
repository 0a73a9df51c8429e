"""hidden x head -> log-probs, the losses on them, and their gradients."""
