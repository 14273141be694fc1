"""Turn the adapters that users give into values for the slots of a program."""
