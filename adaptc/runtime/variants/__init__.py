"""Make the graphs that calls of a program run: one for each number of rows, device, and set of sites."""
