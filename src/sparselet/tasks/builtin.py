"""Three small tasks for the demo, generated from facts and rules written here.

Each has 200 training, 30 validation and 60 test rows, the same on every machine, and no row in two splits. A small
instruction-tuned model fails at all three, mostly because it does not know the expected form of an answer.
"""

import random
from collections.abc import Callable, Iterable

Pair = tuple[str, str]
SIZES = {"train": 200, "validation": 30, "test": 60}

_ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]

_ANIMALS = {
    "mammal": """aardvark, alpaca, anteater, antelope, armadillo, baboon, badger, bat, bear, beaver, bison, boar, buffalo,
        camel, capybara, caribou, cheetah, chimpanzee, chinchilla, chipmunk, cougar, coyote, deer, dingo, dolphin, donkey,
        dormouse, elephant, elk, ermine, ferret, fox, gazelle, gerbil, gibbon, giraffe, goat, gorilla, groundhog, hamster,
        hare, hedgehog, hippopotamus, horse, hyena, ibex, jackal, jaguar, kangaroo, koala, lemming, lemur, leopard, lion,
        llama, lynx, manatee, marmot, meerkat, mole, mongoose, moose""",
    "bird": """albatross, avocet, bittern, blackbird, bullfinch, bustard, buzzard, canary, cassowary, chaffinch, chicken,
        cockatoo, condor, cormorant, crane, crow, cuckoo, curlew, dove, duck, eagle, egret, emu, falcon, flamingo, goldfinch,
        goose, grebe, grouse, gull, harrier, hawk, heron, hoopoe, hornbill, hummingbird, ibis, jackdaw, jay, kestrel,
        kingfisher, kite, kiwi, lapwing, lark, macaw, magpie, mallard, nightingale, nuthatch, oriole, osprey, ostrich, owl,
        parakeet, parrot, partridge, peacock, pelican, penguin, pheasant, pigeon""",
    "fish": """anchovy, angelfish, barbel, barracuda, bass, bream, burbot, carp, catfish, char, chub, cod, dace, dogfish, eel,
        flounder, garfish, goby, goldfish, grayling, grouper, guppy, gurnard, haddock, hake, halibut, herring, lamprey,
        lingcod, loach, lungfish, mackerel, marlin, minnow, monkfish, mullet, perch, pike, pilchard, piranha, plaice,
        pollock, pufferfish, rudd, salmon, sardine, sawfish, seahorse, shark, skate, smelt, snapper, sole, sprat, stickleback,
        stingray, sturgeon, sunfish, swordfish, tench, tilapia, trout""",
    "reptile": """adder, alligator, anaconda, anole, basilisk, boa, caiman, chameleon, cobra, crocodile, gavial, gecko,
        iguana, lizard, mamba, monitor, python, rattlesnake, skink, slowworm, snake, taipan, terrapin, tortoise, tuatara,
        turtle, viper""",
    "insect": """ant, aphid, bedbug, bee, beetle, bumblebee, butterfly, chafer, cicada, cockroach, cricket, damselfly,
        dragonfly, earwig, firefly, flea, fly, glowworm, gnat, grasshopper, hornet, hoverfly, katydid, lacewing, ladybird,
        leafhopper, locust, louse, mantis, mayfly, mealybug, midge, mosquito, moth, sawfly, silverfish, stonefly, termite,
        thrips, wasp, weevil, whitefly""",
    "amphibian": "axolotl, bullfrog, caecilian, eft, frog, newt, olm, salamander, siren, toad",
    "mollusc": """abalone, clam, cockle, conch, cuttlefish, limpet, mussel, nautilus, octopus, oyster, periwinkle, scallop,
        slug, snail, squid, whelk""",
    "arachnid": "harvestman, mite, scorpion, spider, tarantula, tick",
    "crustacean": "barnacle, crab, crayfish, krill, langoustine, lobster, prawn, shrimp, woodlouse",
}

_ITEMS = """espresso, flat white, black coffee, green tea, mint tea, hot chocolate, lemonade, apple juice, tomato soup,
    onion soup, garden salad, cheese omelette, mushroom risotto, fish pie, lentil curry, grilled trout, roast chicken,
    vegetable lasagne, lamb stew, bean burger, garlic bread, rice pudding, carrot cake, apple tart, lemon sorbet""".replace(
    "\n", " "
)
_ORDERS = (
    "Could we have {count} {item} at table {table}, please?",
    "Table {table} would like {count} {item}.",
    "Hello, {count} {item} for table {table} when you can.",
    "Please bring {count} {item} over to table {table}.",
    "We are sitting at table {table} and want {count} {item}.",
    "{count} more {item} for the people at table {table}!",
)


def number_words() -> dict[str, list[Pair]]:
    """A number from 100 to 9999 as English words."""
    numbers = random.Random(1).sample(range(100, 10_000), sum(SIZES.values()))
    return _split((f"Write the number {n} in English words.\nWords:", spell(n)) for n in numbers)


def animal_class() -> dict[str, list[Pair]]:
    """The class an animal belongs to: nine classes, unevenly many animals."""
    pairs = [
        (f"To which class of animals does the {name.strip()} belong?\nClass:", kind)
        for kind, names in _ANIMALS.items()
        for name in names.replace("\n", " ").split(",")
    ]
    return _split(_shuffled(pairs, 2))


def table_order() -> dict[str, list[Pair]]:
    """Item, count and table of a guest's order, in a fixed form."""
    source = random.Random(3)
    items = [item.strip() for item in _ITEMS.split(",")]
    pairs: dict[str, str] = {}
    while len(pairs) < sum(SIZES.values()):
        item, count, table = source.choice(items), source.randint(2, 9), source.randint(1, 40)
        text = source.choice(_ORDERS).format(count=_ONES[count], item=item, table=table)
        pairs[f"Order: {text[0].upper()}{text[1:]}\nNote:"] = f"table {table} | {count} x {item}"
    return _split(pairs.items())


BUILTIN: dict[str, Callable[[], dict[str, list[Pair]]]] = {
    "number_words": number_words,
    "animal_class": animal_class,
    "table_order": table_order,
}


def spell(number: int) -> str:
    """A number from 0 to 9999 in English words, British style: 3144 is "three thousand one hundred and forty-four"."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{_ONES[number // 100]} hundred" + (f" and {spell(number % 100)}" if number % 100 else "")
    remainder = number % 1000
    joint = " and " if 0 < remainder < 100 else " "
    return f"{_ONES[number // 1000]} thousand" + (f"{joint}{spell(remainder)}" if remainder else "")


def _shuffled(pairs: list[Pair], seed: int) -> list[Pair]:
    return random.Random(seed).sample(pairs, len(pairs))


def _split(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    remaining = list(pairs)
    splits = {}
    for name, size in SIZES.items():
        splits[name], remaining = remaining[:size], remaining[size:]
        if len(splits[name]) != size:
            raise ValueError(f"too few rows for the {name} split")
    return splits
