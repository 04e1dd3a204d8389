"""Compiled inner loops of the fitters."""
