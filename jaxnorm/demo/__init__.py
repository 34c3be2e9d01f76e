"""`python -m jaxnorm.demo`: handwritten digits, one network, three norms, every device of this machine.

`_data` standardizes the images with `jaxnorm.moments` and makes masked batches; `_train` is the network, its training
under `jax.shard_map`, and its evaluation; `_plot` draws; `__main__` reads the options and prints the tables.
`python -m jaxnorm.demo.processes` trains the same network over several processes, with checkpoints: `_together` starts,
joins and ends them, `_process` is what each of them does.
"""
