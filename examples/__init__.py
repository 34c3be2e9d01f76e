"""Programs that use jaxnorm. They run from a checkout and are not installed."""
