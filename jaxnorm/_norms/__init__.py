"""One norm, one file: its function and its spec. `base` says what a norm is.

Imports `_core` and `_ops`; a norm imports no other norm.
"""
