"""Words and sums: the data that travels, checks of what comes in, statistics of one device, merging over devices.

Imports JAX alone. To add a norm, skip all of it: `_ops` says what you need of it.
"""
