"""What all benchmarks share: cases and their truth, worker processes, one timing loop, records, tables and charts.

Read `timing` for how times are taken. `jax_process` and `torch_process` run the libraries; skip them unless you change
how a library is called.
"""
