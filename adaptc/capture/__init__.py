"""Any model as an exported program, and what its graph does not say of it."""
