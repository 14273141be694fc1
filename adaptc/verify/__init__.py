"""What adaptc promises of a program, tried on random inputs."""
