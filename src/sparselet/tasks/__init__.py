"""Tasks: rows of a prompt and the text to produce, in three splits."""
