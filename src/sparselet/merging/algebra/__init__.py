"""What merge methods are made of: sums, votes, trims and draws over several deltas of one target."""
