"""One file a method; each defines a `SPEC` that the registry finds by name."""
