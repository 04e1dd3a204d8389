"""Loops of one's own: groups of parameters for an optimizer, codes that follow their gradients, what files store."""
