"""Stores weights and activations in fewer bits."""
