"""Training with sparsity in the forward pass: from scratch, continued, on answers, and recovery of a plan's loss."""
