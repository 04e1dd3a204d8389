"""A converted folder: opened, written, loaded, verified, restored, published."""
