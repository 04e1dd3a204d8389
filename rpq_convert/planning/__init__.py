"""What happens to every parameter, decided before a weight is read."""
