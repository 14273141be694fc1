"""What pictures show, by their content."""
