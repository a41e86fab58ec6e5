"""What a name means: a directory here, or an adapter or checkpoint on the hub."""
