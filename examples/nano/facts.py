"""Questions about a small closed world that the prompt tells."""

import random

from case import Case, says, user

NAMES = (
    "Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jill Karl Lena Max Nora Olaf Pia Quinn Rosa Sven Tess Uwe "
    "Vera Walt Xenia Yuri Zoe"
).split()
# What is told, what asks for the thing, what asks for the person; and the things.
RELATIONS = {
    "place": ("{name} lives in {thing}.", "Where does {name} live?", "Who lives in {thing}?"),
    "food": ("{name} likes {thing}.", "What does {name} like?", "Who likes {thing}?"),
    "animal": ("{name} has a {thing}.", "Which animal does {name} have?", "Who has a {thing}?"),
    "work": ("{name} is a {thing}.", "What is the work of {name}?", "Who is a {thing}?"),
}
THINGS = {
    "place": "Rome Oslo Lima Cairo Paris Delhi Quito Tokyo Berne Seoul Malta Texas".split(),
    "food": "bread rice plums beans soup nuts pears cheese honey figs eggs corn".split(),
    "animal": "dog cat horse goat snake mouse crow sheep frog duck pony wolf".split(),
    "work": "baker nurse pilot judge clerk singer farmer tailor miner waiter poet guard".split(),
}
PEOPLE = 3
World = dict[str, dict[str, str]]


def draw(rng: random.Random, questions: int = 1, count: int = PEOPLE) -> list[Case]:
    """So many people, of whom each relation is told once, in any order; then questions."""
    people = rng.sample(NAMES, count)
    world = {
        relation: dict(zip(people, rng.sample(THINGS[relation], count), strict=True))
        for relation in RELATIONS
    }
    told = [
        RELATIONS[relation][0].format(name=name, thing=thing)
        for relation, things in world.items()
        for name, thing in things.items()
    ]
    rng.shuffle(told)
    asked = [_question(rng, world) for _ in range(questions)]
    texts = [f"{' '.join(told)} {asked[0][0]}", *(question for question, _ in asked[1:])]
    return [
        Case("facts", [user(text)], says(f"It is {answer}."))
        for text, (_, answer) in zip(texts, asked, strict=True)
    ]


def _question(rng: random.Random, world: World) -> tuple[str, str]:
    relation = rng.choice(list(world))
    name, thing = rng.choice(list(world[relation].items()))
    for_thing, for_person = (question.format(name=name, thing=thing) for question in RELATIONS[relation][1:])
    return rng.choice([(for_thing, thing), (for_person, name)])
