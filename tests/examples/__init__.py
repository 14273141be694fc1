"""The examples as scripts, and the snippets of the guides."""
