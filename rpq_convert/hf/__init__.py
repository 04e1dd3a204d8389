"""What is known of transformers and the hub."""
