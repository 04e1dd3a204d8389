"""What a converted model still knows, measured against its base."""
