"""Running a merge: checked, target by target, several at once."""
