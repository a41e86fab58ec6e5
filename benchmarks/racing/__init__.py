"""What the benchmarks share: processes that do jobs, everyone taking turns, and a record of what was run where."""
