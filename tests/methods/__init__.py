"""The methods: all of them by one table of checks, and what is particular to each."""
