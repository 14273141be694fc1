"""Check and prepare the arguments of calls: of ``generate``, of single steps, and those that adapters add."""
