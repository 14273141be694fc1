"""Methods that put virtual tokens before a text, or a KV prefix before its keys and values."""
