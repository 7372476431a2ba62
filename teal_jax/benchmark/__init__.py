"""Measurements of speed: whole tokens (`decode`) and the kernels of a layer (`kernels`). See `teal bench --help`."""
