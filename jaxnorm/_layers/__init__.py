"""Flax: its names for axes, dtypes, masks and parameters, brought to jaxnorm's functions. Skip it without Flax."""
