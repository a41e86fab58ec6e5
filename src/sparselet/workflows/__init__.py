"""Verbs put together."""
