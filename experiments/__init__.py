"""python -m experiments: lists of runs in the tiny world, the tables of EXPERIMENTS.md."""
