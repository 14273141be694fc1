"""Read an adapter from whatever a caller gives, and resolve it for one model."""
