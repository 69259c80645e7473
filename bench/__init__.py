"""python -m bench: speed and memory, as ratios of measurements made in one run."""
