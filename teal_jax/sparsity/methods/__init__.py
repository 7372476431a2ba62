"""How sparsity is shared out and what makes up for it: one method a file, each with its paper."""
