"""Methods that mix several adapters: by a router, by a classifier, or by task."""
