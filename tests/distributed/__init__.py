"""One adapter trained by several processes."""
