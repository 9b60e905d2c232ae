"""The laboratory: data, training, evaluation, comparison and benchmarks, one job a file."""
