"""Parameters and running statistics from and to other libraries. `jaxnorm.convert` is its face."""
