"""Operations that merge methods share: sums, votes, trims and random drops over several deltas of one target."""
