"""Train many adapters of a bank in one step, each with an optimizer of its own."""
