"""Running a merge: checks, then target by target, several at once."""
