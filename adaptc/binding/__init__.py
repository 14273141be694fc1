"""From what a user hands over as an adapter to values for the slots of a program."""
