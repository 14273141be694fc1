"""Methods of vision models that loop over images, and what takes their place where it is found to be equal."""
