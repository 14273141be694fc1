"""Questions about programs that change nothing: sites, attention, facts of the model."""
