"""python -m evals: what a model folder can do, before and after."""
