"""What sparsity costs a model on a text: the sweep of `teal eval` over methods and sparsities, and its report."""
