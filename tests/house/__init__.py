"""The project itself: what is installed, what is linted, what tools need no GPU."""
