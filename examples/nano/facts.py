"""Questions about a small closed world that the prompt tells."""

import random

from case import Case, says, user

NAMES = (
    "Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jill Karl Lena Max Nora Olaf Pia Quinn Rosa Sven Tess Uwe "
    "Vera Walt Xenia Yuri Zoe"
).split()
# What is told, and said for an answer; and what asks for it, by the word that comes first in the answer.
RELATIONS = {
    "place": ("{name} lives in {thing}.", "Where does {name} live?"),
    "food": ("{name} likes {thing}.", "What does {name} like?"),
    "animal": ("The {thing} belongs to {name}.", "Whose is the {thing}?"),
    "work": ("The {thing} is {name}.", "Who is the {thing}?"),
}
THINGS = {
    "place": "Rome Oslo Lima Cairo Paris Delhi Quito Tokyo Berne Seoul Malta Texas".split(),
    "food": "bread rice plums beans soup nuts pears cheese honey figs eggs corn".split(),
    "animal": "dog cat horse goat snake mouse crow sheep frog duck pony wolf".split(),
    "work": "baker nurse pilot judge clerk singer farmer tailor miner waiter poet guard".split(),
}
PEOPLE = 3


def draw(rng: random.Random, questions: int = 1, count: int = PEOPLE) -> list[Case]:
    """So many people, of whom each relation is told once, in any order; then questions about it.

    No fact is asked for twice: the second answer could be had from the first.
    """
    people = rng.sample(NAMES, count)
    world = {
        relation: dict(zip(people, rng.sample(THINGS[relation], count), strict=True))
        for relation in RELATIONS
    }
    facts = [
        [text.format(name=name, thing=thing) for text in RELATIONS[relation]]
        for relation, things in world.items()
        for name, thing in things.items()
    ]
    rng.shuffle(facts)
    asked = rng.sample(facts, min(questions, len(facts)))
    texts = [question for _, question in asked]
    texts[0] = f"{' '.join(told for told, _ in facts)} {texts[0]}"
    return [Case("facts", [user(text)], says(answer)) for text, (answer, _) in zip(texts, asked, strict=True)]
