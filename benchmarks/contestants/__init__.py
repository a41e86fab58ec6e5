"""The contestants of the benchmarks of training, switching, selection and of the whole job."""
