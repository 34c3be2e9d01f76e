"""Verbs with derivatives: statistics, standardize, normalize, the residual sum, activations, running statistics.

Imports `_core` and `_backends`. To add a norm by the statistics of each example, read `rows`; to add one with running
statistics, read `running` and `sharing`. Skip `by_formula`, `by_kernel` and `epilogue`, among which `standardize`
chooses.
"""
