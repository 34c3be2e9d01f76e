"""Kernels: three primitives (`primitives`), the backends that may run them (`registry`), and how jit splits them.

Imports `_core`. Kernels see no derivatives. To add a norm, skip all of it.
"""
