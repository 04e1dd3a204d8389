"""Layers whose weight is computed: surgery on modules, the weight, its operations."""
