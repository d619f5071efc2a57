"""Removes parts of a network."""
