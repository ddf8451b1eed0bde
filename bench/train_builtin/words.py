"""Words and names the training tasks are filled with.

A word is a common one, a pronounceable made-up one or random letters, so that a model learns to
handle letters instead of a list of words. `is_held_out` splits everything by a checksum: facts for
which it is true are never trained on and are all that evaluation uses.
"""

# ruff: noqa: SIM905  # words read better as text than as a list of literals

import random
import re
import zlib

from bench.train_builtin import free_text, templates

COMMON = tuple(
    """
    apple anchor animal arrow autumn baker banana basket beach bean bear bell berry bird blanket
    bottle box branch bread bridge brother bucket butter button cabin cable camel camera candle
    canvas carpet carrot castle cat chair cheese cherry circle city clock cloud coat coffee copper
    corn cotton cow crystal curtain daisy dance deer desert desk diamond doctor dog dolphin door
    dragon drum duck eagle earth east egg elephant engine evening falcon farm feather field finger
    fire fish flag flower forest fox frog garden garlic gate ghost giraffe glass glove goat gold
    grape grass guitar hammer harbor hat hello honey horse hotel house ice insect iron island ivory
    jacket jar jelly jewel jungle kettle key king kitchen kite kiwi ladder lake lamp laptop leaf
    lemon letter library light lime lion lizard lock machine magnet mango maple market melon metal
    milk mint mirror money monkey moon morning motor mountain mouse museum music nail needle nest
    night north nut oak ocean office olive onion orange otter oven owl paint palace panda paper
    parrot peach peanut pear pencil pepper piano pigeon pillow pine pirate pizza planet plum pocket
    potato prince pumpkin puzzle python queen rabbit radio rain raven ring river robot rocket roof
    rose salt sand school sea seed shadow sheep ship shirt shoe silver sister sky snail snow soap
    sock south spider spoon spring square stone storm straw street sugar summer sun swan table tea
    teacher temple tiger time toast tomato tower train tree trumpet tulip turtle umbrella uncle
    valley vase village violin walnut water west whale wheat wheel wind window winter wizard wolf
    wood world yellow zebra stream token cache server block value list word number name
    """.split()
)
COLORS = tuple("red green blue white black pink brown gray purple gold orange yellow".split())
FIELDS = tuple(
    """name age city color id size price count status title year owner country model kind level
    score width height email user host port active""".split()
)
NAMES = tuple(
    """Ann Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Lena Mark Nina Oscar Paula Quinn
    Rosa Sam Tina Uma Victor Wendy Xena Yuri Zoe Paris Rome Berlin Oslo Lima Cairo Tokyo Madrid
    Delhi Vienna Dublin Prague""".split()
)
_ONSETS = tuple(
    "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr pl pr sh sl st th tr".split()
)
_VOWELS = tuple("a e i o u a e i o u ai ea oo ou".split())
_CODAS = ("", "", "", *"n r l s t m d k p x nd st ck ng".split())
# Words that the tokenizer may make one token: their spelling can only be learned by training on
# each of them, so none is held out.
_WHOLE: tuple[str, ...] = tuple(
    sorted(
        {
            found
            for text in (*templates.ALL, *free_text.all_text())
            for found in re.findall(r"(?<![{\w])[a-z]{3,12}(?![}\w])", text)
        }
    )
)
_IS_WHOLE = frozenset(_WHOLE)
_HELD_OUT_SHARE = 8
_MAX_TRIES = 10_000


def is_held_out(fact: str) -> bool:
    """Whether `fact` belongs to evaluation (one in eight) and not to training."""
    return zlib.crc32(fact.encode()) % _HELD_OUT_SHARE == 0


def any_word(rng: random.Random) -> str:
    """A lower-case word of 2 to 12 letters, from either side of the split."""
    kind = rng.random()
    if kind < 0.07:
        return rng.choice(_WHOLE)
    if kind < 0.45:
        return rng.choice(COMMON)
    if kind < 0.8:
        syllables = rng.choice((1, 2, 2, 3, 3, 4))
        return "".join(
            rng.choice(_ONSETS) + rng.choice(_VOWELS) + (rng.choice(_CODAS) if i else "")
            for i in range(syllables)
        )[:12]
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 10)))


def word(rng: random.Random, *, held_out: bool) -> str:
    """A word from the asked side of the split."""
    for _ in range(_MAX_TRIES):
        candidate = any_word(rng)
        if (is_held_out(candidate) and candidate not in _IS_WHOLE) == held_out:
            return candidate
    raise AssertionError("the split left no words")


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """`count` different words."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[any_word(rng)] = None
    return list(found)
