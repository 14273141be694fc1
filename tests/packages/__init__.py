"""AOTInductor packages."""
