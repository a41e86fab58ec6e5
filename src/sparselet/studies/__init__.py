"""A study: experts, merges and evaluations as units of work, their tables, and what these show."""
