"""The Pallas backends, for GPU and TPU: rows alone. Imported when one of them is named, not with jaxnorm."""
