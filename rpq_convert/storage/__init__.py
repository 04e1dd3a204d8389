"""Weight files: read lazily; written completely or not at all."""
