"""A small world of short biographies, in a closed vocabulary of whole words.

A person has one job and one city, told once: " Rosa paints in Naples."  A question asks for one or
two people and the answer restates their facts, so that a greedy answer is right or wrong, and
nothing has to judge it:

    context   " The old bridge leans over the river. Rosa paints in Naples. Ida paints in Turin."
    question  "Who is Rosa?"            answer  "Rosa paints in Naples."

What makes it hard to answer without reading:
- every example draws its people and their facts anew, so nothing about a name can be memorised;
- a context has about half as many jobs and cities as people: jobs and cities are shared, so the
  city has to be bound to the name, not to the job;
- look-alikes: a person also longs for some other city, and weather happens in cities nobody asked
  about.

There is one person in some fourteen tokens and never more than sixteen people (one in 60 tokens at
8x): a long context is mostly filler, so that it measures reach (where is the fact?) and not
capacity (how many facts?).

Sixteen-token chunks that miss the fact make a small model invent one, mostly from what else it
sees: "Rosa sings in Turin." That is a hallucination, and the rejected answer.
"""

import random

NAMES = """Ada Agnes Aldo Alma Amos Anna Anton Astrid Axel Basil Bela Berta Boris Bruno Cara Carl
Celia Chloe Clara Cora Cyril Dana Dario Delia Diego Dora Edgar Edith Elena Elias Elsa Emil Emma
Enzo Erik Esther Eva Felix Flora Franz Frida Georg Greta Gustav Hanna Hans Hector Heidi Helga Henri
Hilda Hugo Ida Igor Ines Irma Isaac Ivan Jakob Jana Jonas Josef Judith Julia Karl Katya Klaus Lara
Laura Lena Leo Lina Linus Lola Louis Lucia Ludwig Luis Lydia Magda Marco Maria Marta Max Mila Mina
Mona Moritz Nadia Nico Nina Nora Olga Olivia Omar Oscar Otto Pablo Paula Pedro Petra Philip Pia
Rafael Ralph Rita Robert Rosa Rudolf Ruth Samuel Sara Selma Silvia Simon Sofia Stefan Tamara Thea
Theo Tilda Tomas Ursula Vera Victor Viola Walter Wanda Yara Zelda""".split()
JOBS = """bakes brews builds carves climbs cooks counts cycles dances draws farms fishes gardens
hunts juggles knits lectures mines nurses paints plants plays prints rows sails sews sings skates
sketches swims teaches trades travels tutors types weaves welds works wrestles writes""".split()
CITIES = """Athens Austin Bergen Berlin Bern Bogota Boston Cairo Dakar Delhi Denver Dublin Geneva
Genoa Hanoi Havana Kiev Kyoto Lagos Lima Lisbon London Lyon Madrid Malta Miami Milan Minsk Munich
Nairobi Naples Oslo Oxford Paris Perth Porto Prague Quito Riga Rome Seoul Seville Tokyo Turin
Venice Vienna Warsaw""".split()
LONGINGS = "misses remembers avoids praises".split()
SLOTS = {
    "adjective": """old quiet narrow yellow empty broken distant silver wooden heavy pale
        tall""".split(),
    "thing": "bridge lamp tower garden clock window boat wall chair lantern orchard mill".split(),
    "act": "leans waits shines rests creaks stands sinks turns".split(),
    "where": "over under behind near beyond beside".split(),
    "place": "river hill market valley harbour forest square meadow".split(),
    "weather": "Snow Rain Fog Dust".split(),
    "falls": "falls drifts gathers lingers".split(),
    "time": "today again often slowly".split(),
    "city": CITIES,
}
FILLERS = """The {thing} {act} {time}.
The {adjective} {thing} {act} {time}.
The {thing} {act} {where} the {place}.
The {adjective} {thing} {act} {where} the {place}.
{weather} {falls} in {city}.
{weather} {falls} {where} the {place} {time}.
The {thing} {where} the {place} is {adjective}.
The road to {city} is {adjective}.""".splitlines()
QUESTIONS = {1: ["What does {} do?", "Who is {}?"], 2: ["Who are {} and {}?"]}
SHORTEST = 5  # tokens of the shortest filler and of a fact


def examples(count, size, seed):
    """Yield `count` examples of `size` tokens of context, or at most four fewer.

    A token is a word with the space before it, or a mark. The same seed gives the same examples.
    `answers` lists what may count as right; here that is `answer`.
    """
    rng = random.Random(seed)
    for _ in range(count):
        context, facts = world(rng, size)
        people = rng.choice([1, 1, 2])
        question, answer = ask(rng, facts, people)
        yield {"context": context, "question": question, "answers": [answer], "answer": answer}


def needle(task, size, depth, seed):
    """One example whose asked fact lies at `depth` per cent of some `size` tokens.

    task: single (nobody else is told of), multikey (up to sixteen people, one is asked for),
    multiquery (two are). "needle" is the sentence that was put there, "others" what is told of
    people who were not asked for: who says that of the wrong one took another needle.
    """
    rng = random.Random(f"{task} {size} {depth} {seed}")
    context, facts = world(rng, size, people=1 if task == "single" else None)
    question, answer = ask(rng, facts, 2 if task == "multiquery" else 1)
    found = next(fact for fact in facts.values() if fact in answer)

    others = []
    for sentence in sentences_of(context):
        if sentence != found:
            others.append(sentence)
    place = round(depth / 100 * len(others))
    others.insert(place, found)
    unasked = [fact.split(" ", 1)[1] for fact in facts.values() if fact not in answer]
    return {"context": joined(others), "question": question, "answers": sentences_of(answer),
            "others": unasked, "needle": found}


def world(rng, size, people=None):
    """A context and its facts, {name: sentence}."""
    if people is None:
        people = max(2, min(16, size // 14))
    names = rng.sample(NAMES, people)
    # Fewer jobs and cities than people: several share one, so that it does not give away who.
    jobs = rng.sample(JOBS, people // 2 + 1)
    cities = rng.sample(CITIES, people // 2 + 1)
    facts = {}
    for name in names:
        facts[name] = f"{name} {rng.choice(jobs)} in {rng.choice(cities)}."

    sentences = list(facts.values())
    for name in names:
        if rng.random() < 0.2:
            sentences.append(f"{name} {rng.choice(LONGINGS)} {rng.choice(CITIES)}.")
    left = size - sum(map(length, sentences))
    while left >= SHORTEST:
        sentence = filler(rng)
        if length(sentence) <= left:
            sentences.append(sentence)
            left -= length(sentence)
    rng.shuffle(sentences)
    return joined(sentences), facts


def ask(rng, facts, people):
    """A question about that many people, and its answer."""
    names = rng.sample(sorted(facts), people)
    question = rng.choice(QUESTIONS[people])
    answer = " ".join(facts[name] for name in names)
    return question.format(*names), answer


def filler(rng):
    """One sentence that says nothing about anybody."""
    frame = rng.choice(FILLERS)
    # A word for every slot, also for those that the frame has not: the draws stay in step.
    drawn = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    return frame.format_map(drawn)


def joined(sentences):
    """A text, each sentence with the space before it, as its tokens have it."""
    return "".join(" " + sentence for sentence in sentences)


def sentences_of(text):
    """The sentences of a text, with their full stops."""
    parts = text.strip().rstrip(".").split(". ")
    return [part + "." for part in parts]


def length(sentence):
    """Tokens of a sentence: its words and the full stop."""
    return len(sentence.split()) + 1


def words():
    """Every word of the world, each once, in a fixed order."""
    frames = []
    for frame in FILLERS + QUESTIONS[1] + QUESTIONS[2]:
        for word in frame.split():
            if "{" not in word:
                frames.append(word.strip("?."))
    found = []
    for each in [NAMES, JOBS, CITIES, LONGINGS, *SLOTS.values(), frames, ["in"]]:
        found += each
    return list(dict.fromkeys(found))
