"""Moves tensors as a plan says. The one place with collectives."""
