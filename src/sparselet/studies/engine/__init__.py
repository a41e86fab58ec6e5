"""Doing the work of a study: units, jobs, workers, the store."""
