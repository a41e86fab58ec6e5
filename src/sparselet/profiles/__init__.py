"""Profiles of experts: second moments of the inputs of their targets, and where their prompts lie; routing by these."""
