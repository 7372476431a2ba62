"""What TEAL's paper analyses in its section 5.4, on any model: `teal analyse`. Nothing else of teal_jax needs it."""
