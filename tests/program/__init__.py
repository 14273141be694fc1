"""Programs over their lives: merged, saved, trained, in random orders."""
