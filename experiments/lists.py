"""Which runs there are: LISTS = {name: ({cell: difference from experiments/base.py}, seeds)}.

A difference holds keys of configs/default.py, and those of the runner: see run.py, remade.py.
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

# The search for a recipe at lr 5e-3, one seed a try, in the order in which things were tried.
SCREEN = {
    "1200 examples": {"fresh_questions": 100},
    "1200 examples, YaRN": {"fresh_questions": 200, "fresh_sizes": [104, 1000], **YARN},
    "4800 examples": {"n_examples": 4800},
    "4800 examples, YaRN": {"n_examples": 4800, "fresh_questions": 200, **YARN},
}

# The rate, with YaRN as a key of the config: seed 6, which no later table has, and seed 1.
ON_YARN = {"yarn_factor": 8.0, "rope_theta": 0.0, "n_examples": 4800}
RATES = {
    "lr 5e-3": ON_YARN,
    "lr 3e-3": {**ON_YARN, "lr": 3e-3},
    "lr 2e-3": {**ON_YARN, "lr": 2e-3},
    "lr 2e-3, 200 steps": {**ON_YARN, "lr": 2e-3, "steps": 200},
    "lr 1e-3": {**ON_YARN, "lr": 1e-3},
    "lr 1e-3, YaRN factor 16": {**ON_YARN, "lr": 1e-3, "yarn_factor": 16.0},
    "lr 1e-3, YaRN factor 16, window 2048":
        {**ON_YARN, "lr": 1e-3, "yarn_factor": 16.0, "window": 2048},
    "SFT, lr 5e-3": {**ON_YARN, "beta": 0.0},
    "SFT, lr 2e-3": {**ON_YARN, "beta": 0.0, "lr": 2e-3},
}

# What the search came to. Objectives that are compared have the same answers, positions and steps.
RECIPE = {"yarn_factor": 8.0, "rope_theta": 0.0, "n_examples": 4800, "lr": 1.5e-3}
SFT = {"beta": 0.0}  # at sft_weight=1 what is left is SFT on the chosen answer
RECIPES = {
    "LOGO": RECIPE,
    "SFT on the answer": {**RECIPE, **SFT},
}

# Objectives by positions; "continuous" is the recipe's own.
POSITIONS = {}
for how in ("none", "mix", "pose", "randpos"):
    POSITIONS[f"LOGO, {how}"] = {**RECIPE, "positions": how}
    POSITIONS[f"SFT on the answer, {how}"] = {**RECIPE, **SFT, "positions": how}
# What the preference term does there without the SFT term beside it.
POSITIONS["LOGO, none, lambda 0"] = {**RECIPE, "positions": "none", "sft_weight": 0.0}
# "mix" is the paper's 9 : 1 of continuous to sparse samples; 10 : 0 is the recipe.
for ratio, share in (("5:5", 0.5), ("0:10", 1.0)):
    mixed = {**RECIPE, "positions": "mix", "sparse_share": share}
    POSITIONS[f"LOGO, mix {ratio}"] = mixed
    POSITIONS[f"SFT on the answer, mix {ratio}"] = {**mixed, **SFT}
OBJECTIVES = {
    "SimPO (M = 1)": {**RECIPE, "n_rejected": 1},
    "LOGO, M = 4": {**RECIPE, "n_rejected": 4, "candidates": 8},
    "LOGO, M = 8": {**RECIPE, "n_rejected": 8, "candidates": 16},
    "SFT on everything": {**RECIPE, **SFT, "variant": "sft_all"},
    "SimPO, real positions": {**RECIPE, "n_rejected": 1, "positions": "none"},
}

# One thing at a time, from the recipe.
KNOBS = {
    "other order of additions": {**RECIPE, "micro_batch": 8},
    "lambda 0": {**RECIPE, "sft_weight": 0.0},
    "lambda 0.1": {**RECIPE, "sft_weight": 0.1},
    "beta 10, gamma 3 (the paper's)": {**RECIPE, "beta": 10.0, "gamma": 3.0},
    "all weights": {**RECIPE, "lora_r": 0},
    "LoRA on q, k, v, o": {**RECIPE, "lora_targets": "q_proj,k_proj,v_proj,o_proj"},
    "prompts half as long": {**RECIPE, "n_chunks": 3},
    "no YaRN, theta 3e5": {**RECIPE, "yarn_factor": 0.0, "rope_theta": 3e5},
    "SFT, no YaRN, theta 3e5": {**RECIPE, **SFT, "yarn_factor": 0.0, "rope_theta": 3e5},
}

# Where could preference win?
UNVERIFIED = {"require_correct_chosen": False, "require_wrong_rejected": False}
WINS = {
    "LOGO, unverified pairs": {**RECIPE, **UNVERIFIED},
    "SFT, unverified pairs": {**RECIPE, **SFT, **UNVERIFIED},
    "LOGO, 100 pairs": {**RECIPE, "few": 100},
    "SFT, 100 pairs": {**RECIPE, **SFT, "few": 100},
    "LOGO, own wrong answers": {**RECIPE, "negatives": "own"},
    "LOGO, own wrong answers alone": {**RECIPE, "negatives": "own_only"},
    "SFT, those pairs": {**RECIPE, **SFT, "negatives": "own_where"},
}
# The first two once more, measured at lower temperatures as well: what a line before has not.
COOLER = {
    "LOGO, unverified pairs": WINS["LOGO, unverified pairs"],
    "SFT, unverified pairs": WINS["SFT, unverified pairs"],
}
NEIGHBOURS = {
    "DiscoPOP's loss": {**RECIPE, "variant": "discopop"},
    "LongPO's reward": {**RECIPE, "variant": "longpo"},
    "KL to the base": {**RECIPE, "variant": "base_kl"},
    "LongRecipe's positions": {**RECIPE, "variant": "longrecipe"},
    "chunks shuffled (Untie the Knots)": {**RECIPE, "variant": "untie_knots"},
}
BUGS = {
    "the slice": {**RECIPE, "variant": "bug_slice"},
    "unshifted SFT term": {**RECIPE, "variant": "bug_unshifted"},
    "padded labels": {**RECIPE, "variant": "bug_padding"},
}

# Which prompts the rejected answers come from: all on the pairs that have two of each kind.
# Of each there have to be enough, whichever of them a cell then keeps.
OF_KINDS = {**RECIPE, "built": {"n_rejected": 4, "candidates": 8}}
KINDS = {
    "LOGO, irrelevant only": {**OF_KINDS, "kinds": "irrelevant"},
    "LOGO, partial only": {**OF_KINDS, "kinds": "partial"},
    "LOGO, both": {**OF_KINDS, "kinds": "both"},
    "SFT, those pairs": {**OF_KINDS, **SFT, "kinds": "both"},
}
# Own wrong answers as one more; and their pairs, which are few, without them.
NEGATIVES = {
    "LOGO, M = 3": {**RECIPE, "n_rejected": 3},
    "LOGO, M = 3, own wrong answers": {**RECIPE, "n_rejected": 3, "negatives": "own"},
    "LOGO, the pairs of own wrong answers": {**RECIPE, "negatives": "own_where"},
}
FEW = {}
for n in (50, 200):
    FEW[f"LOGO, {n} pairs"] = {**RECIPE, "few": n}
    FEW[f"SFT, {n} pairs"] = {**RECIPE, **SFT, "few": n}
# The recipe samples at temperature 0.7.
SAMPLED = {}
for temperature in (0.0, 1.0):
    answers = {"temperature": temperature}
    SAMPLED[f"LOGO, temperature {temperature:g}"] = {**RECIPE, **answers}
    SAMPLED[f"SFT, temperature {temperature:g}"] = {**RECIPE, **SFT, **answers}
FROM_REFERENCE = {"chosen_from": "reference"}
VERIFIED = {
    "LOGO, the reference as chosen": {**RECIPE, **FROM_REFERENCE},
    "SFT, the reference as chosen": {**RECIPE, **SFT, **FROM_REFERENCE},
}
# The same once more, beside as many steps at once; and answers by another model than the trained.
BY_SFT = {"policy": {**RECIPE, **SFT}}
ROUNDS = {
    "LOGO, two rounds": {**RECIPE, "rounds": 2},
    "SFT, two rounds": {**RECIPE, **SFT, "rounds": 2},
    "LOGO, 800 steps": {**RECIPE, "steps": 800},
    "SFT, 800 steps": {**RECIPE, **SFT, "steps": 800},
    "LOGO, answers by the SFT model": {**RECIPE, **BY_SFT},
    "SFT, answers by the SFT model": {**RECIPE, **SFT, **BY_SFT},
}
# What is real and what is not. A real prompt of 1,000 tokens needs room for question and answer.
LONG = {**RECIPE, "context_size": 1000}
REAL = {**LONG, "whole": True, "window": 1088, "positions": "none", "micro_batch": 4}
LENGTH = {
    "LOGO, real length": REAL,
    "SFT, real length": {**REAL, **SFT},
    "LOGO, the same documents": LONG,
    "SFT, the same documents": {**LONG, **SFT},
}
# The window in windows of the model, with YaRN's factor. 8x is the recipe's.
for times in (2, 4, 16):
    wide = {**RECIPE, "window": 128 * times, "yarn_factor": float(times)}
    wide["fresh_sizes"] = [104, 232, 488, 1000, 2024]
    LENGTH[f"LOGO, window {times}x"] = wide
    LENGTH[f"SFT, window {times}x"] = {**wide, **SFT}
# 30 % of the window is real, as LongRecipe trains; and the neighbours' positions under SFT.
THIRD = {**RECIPE, "n_chunks": 19}
POSITIONED = {
    "SFT, LongRecipe's positions": {**RECIPE, **SFT, "variant": "longrecipe"},
    "SFT, chunks shuffled": {**RECIPE, **SFT, "variant": "untie_knots"},
    "LOGO, 30 % real": THIRD,
    "SFT, 30 % real": {**THIRD, **SFT},
    "LOGO, LongRecipe's positions, 30 % real": {**THIRD, "variant": "longrecipe"},
    "KL to the base alone": {**RECIPE, **SFT, "sft_weight": 0.0, "variant": "base_kl"},
    "SFT, unshifted": {**RECIPE, **SFT, "variant": "bug_unshifted"},
}

# A real model. Pairs take half an hour: all seeds have those of one, and the same questions.
REAL_MODEL = {"world": "smollm2", "built": {"seed": 0, "n_rejected": 2}}
REAL_SFT = {**REAL_MODEL, "beta": 0.0, "sft_weight": 1.0}
# Other questions make the pairs, and other ones are asked.
OTHERS = {"built": {"seed": 1, "n_rejected": 2}}
LORA = {"lora_r": 16, "lora_alpha": 32, "lr": 1e-3}
SMOLLM2 = {
    "the base": {**REAL_MODEL, "steps": 0},
    "LOGO": REAL_MODEL,
    "LOGO, lr 1e-4": {**REAL_MODEL, "lr": 1e-4},
    "SFT on the answer": REAL_SFT,
    "SFT on the answer, lr 1e-4": {**REAL_SFT, "lr": 1e-4},
    "SimPO (M = 1)": {**REAL_MODEL, "n_rejected": 1},
    "LOGO, own wrong answers": {**REAL_MODEL, "negatives": "own"},
    "LOGO, LoRA": {**REAL_MODEL, **LORA},
    "SFT on the answer, LoRA": {**REAL_SFT, **LORA},
    "LOGO, other pairs": {**REAL_MODEL, **OTHERS},
    "SFT on the answer, other pairs": {**REAL_SFT, **OTHERS},
    "the base, other questions": {**REAL_MODEL, **OTHERS, "steps": 0},
}

SEEDS = [1, 2, 3, 4, 5]
LISTS = {
    "references": (REFERENCES, SEEDS),
    "screen": (SCREEN, [0]),
    "rates": (RATES, [6, 1]),
    "recipe": (RECIPES, SEEDS),
    "positions": (POSITIONS, SEEDS),
    "objectives": (OBJECTIVES, SEEDS),
    "knobs": (KNOBS, SEEDS),
    "wins": (WINS, SEEDS),
    "cooler": (COOLER, SEEDS),
    "neighbours": (NEIGHBOURS, SEEDS),
    "bugs": (BUGS, SEEDS),
    "kinds": (KINDS, SEEDS),
    "negatives": (NEGATIVES, SEEDS),
    "few": (FEW, SEEDS),
    "sampled": (SAMPLED, SEEDS),
    "verified": (VERIFIED, SEEDS),
    "rounds": (ROUNDS, SEEDS),
    "length": (LENGTH, SEEDS),
    "positioned": (POSITIONED, SEEDS),
    "smollm2": (SMOLLM2, [1, 2]),
}
