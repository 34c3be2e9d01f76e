"""Inputs, observations, rewards and targets, normalized by statistics of data. Imports no Flax."""
