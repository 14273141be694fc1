"""Parts that several methods use: configs, options, targets, and the registry."""
