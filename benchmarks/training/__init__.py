"""Training from random codes, measured beside what else the same bytes could be."""
