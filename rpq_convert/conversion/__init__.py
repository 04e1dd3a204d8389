"""Conversions: of a model in memory, of a checkpoint as a stream."""
