"""The module that trains: modes, and steps with backwards of their own."""
