"""Running programs: options, arguments, the code of calls, and what is held between them."""
