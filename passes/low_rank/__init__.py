"""Replaces a large matrix by the product of two small ones."""
