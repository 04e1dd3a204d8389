"""What numba lacks: vectors, AMX tiles, byte tables, torch's threads."""
