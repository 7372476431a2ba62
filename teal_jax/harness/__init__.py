"""lm-evaluation-harness on this library's models: the adapter called `teal_jax`, and `run_tasks`; extra `eval`."""
