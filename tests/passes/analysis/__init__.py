"""What is found in graphs: sites, aliases, attention."""
