"""Launch flags, the YAML file and the options of one request."""
