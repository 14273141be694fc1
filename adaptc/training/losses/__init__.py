"""Terms that a method adds to the loss of a training program."""
