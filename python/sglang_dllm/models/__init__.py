"""Model architectures: config classes, module trees, weight names."""
