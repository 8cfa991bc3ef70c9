"""The words the tasks are written with: haystack noise, needle keys, variable names, people."""

import random

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is bright.",
    "On we walk.",
    "Over the hill and home again.",
)

_KEY_TEXT = """
acorn anchor apron arrow badge bagel banjo barrel basket beacon bench blanket bottle bowl branch brick bridge
broom brush bucket button cabin cable camel candle canoe canvas carpet castle cedar cellar chain chalk cherry
chimney circle clock cloud clover coast cobalt coin comet copper coral cotton cradle crane crater crown crystal
curtain daisy dancer desert diamond dolphin donkey dragon drawer drum eagle easel ember engine envelope falcon
feather fence ferry fiddle flag flame flask flute forest fossil fountain garden garlic garnet gate glacier glove
goblet granite grape hammer harbor harp hazel helmet heron honey horizon hornet island ivory jacket jasmine
jungle kettle key kite ladder lagoon lantern lemon lily lizard locket lumber magnet mango maple marble meadow
melon mirror mitten monkey mortar mosaic mountain napkin needle nest nickel notebook nutmeg oak oasis ocean
olive onion opal orchard otter oyster paddle palace panther paper parrot pebble pencil pepper piano pillow
pine planet plum pocket pond poppy prairie pumpkin puzzle quartz quill rabbit raft raven ribbon river rocket
saddle sailor salmon sandal satin saucer shell shovel silver sparrow spider spoon stable staircase statue
summit sunset table teapot temple thimble thunder ticket tiger timber torch tower tractor trumpet tulip tunnel
turtle valley velvet village violin walnut walrus willow window winter wolf wrench yarn yogurt zebra zipper
"""
KEYS = tuple(_KEY_TEXT.split())

_NAME_TEXT = """
Abel Abby Ada Adam Agnes Aida Alan Alba Albert Alex Alice Alma Alvin Amber Amos Amy Ana Andre Angus Anita Anna
Anton April Archie Arlo Arthur Asher Astrid Aurora Ava Axel Barbara Basil Beatrix Bella Ben Bernard Bess Beth
Blake Bonnie Boris Brenda Brian Bruno Byron Caleb Cara Carl Carmen Carol Cecil Celia Chloe Clara Claude Clive
Cora Cyrus Daisy Dale Damian Dana Daniel Daphne Darius David Dean Della Denis Derek Diana Dora Doris Duncan
Dylan Earl Edgar Edith Edwin Elena Eli Elise Ella Elliot Elmer Elsa Emil Emma Enid Enzo Eric Erin Esme Esther
Ethan Eva Ezra Faith Felix Fern Finn Fiona Flora Floyd Frances Frank Freya Fritz Gail Gavin Gemma George Gideon
Gilda Gina Glen Gloria Grace Greta Gus Hannah Harold Harry Hazel Hector Heidi Helen Henry Herman Hilda Holly
Homer Hope Howard Hubert Hugo Ian Ida Igor Imogen Ingrid Ira Irene Iris Isaac Isla Ivan Ivor Jack Jacob Jade
James Jane Jared Jason Jasper Jean Jenna Jesse Jill Joan Joel John Jonas Josie Joyce Judy Julia June Kai Kara
Karl Kate Keith Kelly Ken Kira Kurt Lana Lars Laura Leah Lena Leo Leon Lester Liam Lila Linda Lionel Lisa Livia
Lloyd Lois Lola Lorna Louis Lucas Lucy Luke Luna Lydia Mabel Maeve Magda Marco Margo Maria Mark Marta Mary
Mason Maud Max Maya Megan Mia Miles Milo Mina Mira Molly Mona Morris Myra Nadia Naomi Neil Nell Nico Nina Noah
Nora Norman Odette Olga Oliver Olive Omar Oona Orla Oscar Otis Otto Owen Pablo Paige Pam Paul Pearl Pedro Peggy
Penny Percy Peter Petra Philip Phoebe Polly Quentin Quinn Rachel Ralph Ramona Raoul Regina Rex Rhea Rita Robert
"""
NAMES = tuple(_NAME_TEXT.split())


def _variables(count: int) -> tuple[str, ...]:
    """`count` pronounceable five-letter names in capitals, such as TOKAR."""
    rng = random.Random(5)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(letters) for letters in ("BDFGKLMNPRSTVZ", "AEIOU") * 2) + rng.choice("KLMNRST")] = None
    return tuple(names)


CODES = _variables(512)
VARIABLES = CODES[:128]
