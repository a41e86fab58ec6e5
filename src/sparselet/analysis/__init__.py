"""Where a task's change lives: statistics of a change, each beside what it would be by chance."""
