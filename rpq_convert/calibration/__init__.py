"""Statistics of inputs, layer by layer, and what errors cost."""
