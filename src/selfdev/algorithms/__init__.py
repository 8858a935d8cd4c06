"""Merging algorithms: short worked examples for the factory, and the human-designed methods."""
