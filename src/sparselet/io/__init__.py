"""Files: written whole or not at all, read safely, bounded in what they ask for."""
