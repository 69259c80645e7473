"""Which runs there are: LISTS = {name: ({cell: difference from experiments/base.py}, seeds)}.

A difference holds keys of configs/default.py, and two of the runner: steps=0 measures without
training, and rope_scaling is written into the model's config.json.
"""
YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    "rope_theta": 0.0,  # the checkpoint's own
}
YARN_PLAIN = {**YARN, "rope_scaling": {**YARN["rope_scaling"], "attention_factor": 1.0}}
# NTK-aware: the base at which the slowest pair turns 8 times slower, theta * 8^(D / (D - 2)).
NTK = {"rope_theta": 10_000 * 8 ** (32 / 30)}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 0.0}

# What a model can do without training, at several rotary bases and scalings.
REFERENCES = {
    "the base": {"steps": 0, "rope_theta": 0.0},
    "theta alone": {"steps": 0},
    "linear": {"steps": 0, **LINEAR},
    "NTK": {"steps": 0, **NTK},
    "YaRN without its temperature": {"steps": 0, **YARN_PLAIN},
    "YaRN": {"steps": 0, **YARN},
}

# The search for a recipe, one seed a try, in the order in which things were tried.
SCREEN = {
    "1200 examples": {"fresh_questions": 100},
    "1200 examples, YaRN": {"fresh_questions": 200, "fresh_sizes": [104, 1000], **YARN},
    "4800 examples": {"n_examples": 4800},
    "4800 examples, YaRN": {"n_examples": 4800, "fresh_questions": 200, **YARN},
}

# What the search came to, and SFT on the same answers, at the same positions, for as many steps.
RECIPE = {"yarn_factor": 8.0, "rope_theta": 0.0, "n_examples": 4800}
SFT = {"beta": 0.0}
RECIPES = {
    "LOGO": RECIPE,
    "SFT on the answer": {**RECIPE, **SFT},
}
# Objectives by positions. LOGO M=2 and SFT at continuous positions are the recipe's own lines.
GRID = {
    "LOGO M=2, no position synthesis": {**RECIPE, "positions": "none"},
    "SFT, no position synthesis": {**RECIPE, **SFT, "positions": "none"},
    "LOGO M=2, mix": {**RECIPE, "positions": "mix"},
    "SFT, mix": {**RECIPE, **SFT, "positions": "mix"},
    "LOGO M=2, lambda 0": {**RECIPE, "sft_weight": 0.0},
    "LOGO M=1 (SimPO)": {**RECIPE, "n_rejected": 1},
    "LOGO M=4": {**RECIPE, "n_rejected": 4},
}

LISTS = {
    "references": (REFERENCES, [1, 2, 3, 4, 5]),
    "screen": (SCREEN, [0]),
    "recipe": (RECIPES, [1, 2, 3, 4, 5]),
    "grid": (GRID, [1, 2, 3, 4, 5]),
}
