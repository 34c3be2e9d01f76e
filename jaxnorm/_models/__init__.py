"""Tools over whole models: trees of parameters and norms, by path. `jaxnorm.models` has their public names."""
