"""Helpers that users and tests share: the plain oracle, assertions, rank launchers."""
