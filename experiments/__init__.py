"""python -m experiments: named lists of runs in the tiny world, and the tables of EXPERIMENTS.md."""
