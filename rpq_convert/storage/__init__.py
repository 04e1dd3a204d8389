"""Files of weights: read lazily, written whole or not at all."""
