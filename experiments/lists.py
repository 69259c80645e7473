"""Which runs there are: LISTS = {name: ({cell: difference from experiments/base.py}, seeds)}.

A difference holds keys of configs/default.py, and two of the runner: steps=0 measures without training, and
rope_scaling is written into the model's config.json.
"""
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128}, "rope_theta": 0.0}
YARN_PLAIN = {**YARN, "rope_scaling": {**YARN["rope_scaling"], "attention_factor": 1.0}}
NTK = {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "rope_theta": 0.0}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 0.0}

# What a model can do without training, at several rotary bases and scalings.
REFERENCES = {
    "the base": {"steps": 0, "rope_theta": 0.0},
    "theta alone": {"steps": 0},
    "linear": {"steps": 0, **LINEAR},
    "dynamic NTK": {"steps": 0, **NTK},
    "YaRN without its temperature": {"steps": 0, **YARN_PLAIN},
    "YaRN": {"steps": 0, **YARN},
}

LISTS = {
    "references": (REFERENCES, [1, 2, 3, 4, 5]),
    "screen": ({}, [0]),
}
