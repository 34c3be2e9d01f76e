"""Reparametrized weights: pure functions of parameters, and specs. `jaxnorm.weights` has their public names."""
