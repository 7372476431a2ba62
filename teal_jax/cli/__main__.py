"""`python -m teal_jax.cli`, where the `teal` script is not on the path."""

from teal_jax.cli import main

main()
