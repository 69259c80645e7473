"""Questions of the tiny world that are harder than its own: nobody is told of, or too many are.

Each function yields as examples() of models/tiny/world.py does, whose module is given to it, and
"name": who is asked about.
"""
import random
from collections.abc import Iterator
from types import ModuleType


def gone(world: ModuleType, count: int, size: int, seed: int) -> Iterator[dict]:
    """The asked person's fact is taken out of the context; what he longs for stays.

    The right thing to do would be to say so. The model has no words for it: what is counted is
    whether it states a job and a city all the same.
    """
    rng = random.Random(f"gone {seed}")
    for _ in range(count):
        context, facts = world.world(rng, size)
        name = rng.choice(sorted(facts))
        question = rng.choice(world.QUESTIONS[1]).format(name)
        # Each sentence stands with the space before it.
        without = context.replace(" " + facts[name], "")
        yield {
            "context": without,
            "question": question,
            "answers": [facts[name]],
            "name": name,
        }


def alike(world: ModuleType, count: int, size: int, seed: int) -> Iterator[dict]:
    """Sixteen people share three jobs and three cities, and the asked one longs for four cities.

    Everything in the answer is near the wrong name too: it has to be bound, not found.
    """
    rng = random.Random(f"alike {seed}")
    for _ in range(count):
        names = rng.sample(world.NAMES, 16)
        jobs = rng.sample(world.JOBS, 3)
        cities = rng.sample(world.CITIES, 3)
        facts = {}
        for name in names:
            facts[name] = f"{name} {rng.choice(jobs)} in {rng.choice(cities)}."
        sentences = list(facts.values())
        asked = rng.choice(names)
        for longing in world.LONGINGS:
            sentences.append(f"{asked} {longing} {rng.choice(cities)}.")
        left = size - sum(map(world.length, sentences))
        while left >= world.SHORTEST:
            sentence = world.filler(rng)
            if world.length(sentence) <= left:
                sentences.append(sentence)
                left -= world.length(sentence)
        rng.shuffle(sentences)
        question = rng.choice(world.QUESTIONS[1]).format(asked)
        yield {
            "context": world.joined(sentences),
            "question": question,
            "answers": [facts[asked]],
            "name": asked,
        }
