"""Sort an emoji font's images into labels by what Unicode calls them: a data set for `encode` and `train-diffusion`.

    python -m tools.label_emoji noto-emoji/png/512 data/emoji
    python -m tools.label_emoji noto-emoji/png/512 data/emoji --only clock face heart

Reads files named `emoji_u1f600.webp` (or .png); `unicodedata` of the standard library knows what these code points are
called. Writes the images and a labels.csv (file, label, name) into a new folder. Images that differ from another one
only by a skin tone, by "man" or "woman" or by the direction of a walk are left out: near copies on both sides of the
split would make the held-out loss look better than it is.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FILE = re.compile(r"emoji_u([0-9a-f]+(?:_[0-9a-f]+)*)\.(?:webp|png)")
VARIANTS = {0x2640, 0x2642, 0x27A1, *range(0x1F3FB, 0x1F400)}  # female, male, rightwards, skin tones

RULES = """
clock: CLOCK FACE
animal: RAT, MOUSE FACE, =MOUSE, OX, BUFFALO, COW, TIGER, LEOPARD, RABBIT, CAT, DRAGON FACE, =DRAGON, CROCODILE,
  WHALE, SNAIL, SNAKE, HORSE FACE, =HORSE, RAM, GOAT, SHEEP, MONKEY, ROOSTER, CHICKEN, =DOG, DOG FACE, GUIDE DOG,
  PIG, BOAR, ELEPHANT, OCTOPUS, BUG, ANT, HONEYBEE, BEETLE, =FISH, TROPICAL FISH, BLOWFISH, TURTLE, CHICK, BIRD,
  PENGUIN, KOALA, POODLE, CAMEL, DOLPHIN, FROG, HAMSTER, WOLF, =BEAR FACE, PANDA, CHIPMUNK, CRAB, LION, SCORPION,
  TURKEY, UNICORN, EAGLE, DUCK, =BAT, SHARK, OWL, FOX, BUTTERFLY, DEER, GORILLA, LIZARD, RHINOCEROS, =SHRIMP, SQUID,
  GIRAFFE, ZEBRA, HEDGEHOG, SAUROPOD, T-REX, =CRICKET, KANGAROO, LLAMA, PEACOCK, HIPPOPOTAMUS, PARROT, RACCOON,
  LOBSTER, MOSQUITO, BADGER, SWAN, MAMMOTH, DODO, SLOTH, OTTER, ORANGUTAN, SKUNK, FLAMINGO, BEAVER, BISON, SEAL,
  SPIDER, DOVE, FLY, WORM, COCKROACH, DONKEY, MOOSE, GOOSE, JELLYFISH
weather: MOON SYMBOL, MOON WITH, CRESCENT MOON, SUN, CLOUD, GLOWING STAR, SHOOTING STAR, MEDIUM STAR, BLACK STAR,
  RAINBOW, TORNADO, SNOWFLAKE, CYCLONE, COMET, SPARKLES
person: GESTURE, FACE PALM, PERSON WITH POUTING FACE
face: FACE WITH, GRINNING, SMILING, WINKING, LAUGHING, ROBOT FACE, GHOST, SKULL, IMP, ALIEN, OGRE, GOBLIN, POO,
  HOLDING BACK TEARS, SAVOURING, THROWING A KISS, SCREAMING
person: MAN, WOMAN, MEN, WOMEN, PERSON, ADULT, BOY, GIRL, CHILD, OFFICER, BRIDE, GUARDSMAN, WORKER, PRINCE,
  PRINCESS, ANGEL, DANCER, MASSAGE, HAIRCUT, SLEUTH, RUNNER, SURFER, SWIMMER, LIFTER, GOLFER, SNOWBOARDER, SKIER,
  BICYCLIST, PEDESTRIAN, ROWBOAT, SHRUG, CARTWHEEL, JUGGLING, FENCER, WRESTLERS, WATER POLO, HANDBALL, NINJA,
  SUPERHERO, SUPERVILLAIN, MAGE, FAIRY, VAMPIRE, MERPERSON, ELF, GENIE, ZOMBIE, TROLL, =BABY, FATHER CHRISTMAS,
  MOTHER CHRISTMAS, SELFIE, BREAST-FEEDING, =KISS, COUPLE, PEOPLE, BUST, BUSTS, HORSE RACING, EMOJI COMPONENT
face: FACE
heart: HEART, HEARTS
hand: HAND, HANDS, FIST, BACKHAND, POINTING INDEX, INDEX POINTING, THUMBS, FINGERS, PALMS, HORNS, BICEPS
arrow: ARROW, ARROWS, TRIANGLE
flag: FLAG, FLAGS
food: HOT DOG, TACO, BURRITO, CHESTNUT, MAIZE, PEPPER, TOMATO, AUBERGINE, GRAPES, MELON, WATERMELON, TANGERINE,
  LEMON, BANANA, PINEAPPLE, APPLE, PEAR, PEACH, CHERRIES, STRAWBERRY, HAMBURGER, PIZZA, MEAT, POULTRY, RICE, BOWL,
  SPAGHETTI, BREAD, FRIES, POTATO, DANGO, ODEN, SUSHI, SHRIMP, FISH CAKE, ICE CREAM, SHAVED ICE, DOUGHNUT, COOKIE,
  CHOCOLATE, CANDY, LOLLIPOP, CUSTARD, HONEY POT, SHORTCAKE, BENTO, FOOD, COOKING, TEACUP, SAKE, WINE, COCKTAIL,
  DRINK, BEER, POPCORN, CAKE, CROISSANT, AVOCADO, CUCUMBER, BACON, CARROT, SALAD, FLATBREAD, EGG, MILK, PEANUTS,
  KIWIFRUIT, PANCAKES, DUMPLING, TAKEOUT, CUP, COCONUT, BROCCOLI, PIE, PRETZEL, SANDWICH, LEAFY, MANGO, BAGEL,
  CHEESE, CUPCAKE, SALT, BEVERAGE, GARLIC, ONION, FALAFEL, WAFFLE, BUTTER, ICE CUBE, TEA, OYSTER, BLUEBERRIES,
  OLIVE, TAMALE, FONDUE, TEAPOT, BEANS, JAR, MUSHROOM, GLASSES, TUMBLER, BOTTLE WITH POPPING CORK, GINGER, POD
plant: SEEDLING, TREE, CACTUS, TULIP, BLOSSOM, ROSE, HIBISCUS, SUNFLOWER, HERB, CLOVER, LEAF, BOUQUET, FLOWER,
  SHAMROCK, POTTED, LOTUS, CORAL, PINE DECORATION, HYACINTH
vehicle: ROCKET, HELICOPTER, LOCOMOTIVE, RAILWAY CAR, TRAIN, METRO, RAIL, TRAM, BUS, ONCOMING, TROLLEYBUS, MINIBUS,
  AMBULANCE, FIRE ENGINE, CAR, TAXI, AUTOMOBILE, VEHICLE, TRUCK, LORRY, TRACTOR, MONORAIL, CABLEWAY, TRAMWAY, SHIP,
  SPEEDBOAT, BICYCLE, BOAT, AIRPLANE, SCOOTER, CANOE, SAUCER, RICKSHAW, MOTORCYCLE, FERRY, SAILBOAT, SATELLITE
place: HOUSE, HOUSES, BUILDING, BUILDINGS, CITYSCAPE, CASTLE, STORE, HOTEL, SCHOOL, HOSPITAL, BANK, POST OFFICE,
  FACTORY, STADIUM, CHURCH, MOSQUE, SYNAGOGUE, TEMPLE, SHRINE, KAABA, HUT, TOWER, LIBERTY, MOUNTAIN, MOUNTAINS,
  VOLCANO, DESERT, ISLAND, PARK, BEACH, CAMPING, TENT, BRIDGE, SUNRISE, SUNSET, FUJI, =FOUNTAIN, STATION, WHEEL,
  COASTER, NIGHT, FOGGY, GLOBE, MILKY WAY
sign: SIGN, SYMBOL, SQUARED, SQUARE, CIRCLE, CIRCLED, DIGIT, NUMBER, ASTERISK, KEYCAP, DIAMOND, MARK, BUTTON, CROSS,
  STAR OF DAVID, ARIES, TAURUS, GEMINI, CANCER, LEO, VIRGO, LIBRA, SCORPIUS, SAGITTARIUS, CAPRICORN, AQUARIUS,
  PISCES, OPHIUCHUS, NO, HEAVY, SUIT, YIN YANG, DHARMA, LOOP, DASH, INFORMATION SOURCE, PASSPORT, CUSTOMS, BAGGAGE,
  LUGGAGE, RESTROOM, CLOSET, CROSSING, VERTICAL BAR, OFF, CINEMA, ANTENNA WITH, VIBRATION, TRIDENT, STOP, RECORD
clothing: HAT, SHIRT, T-SHIRT, JEANS, DRESS, KIMONO, BIKINI, CLOTHES, PURSE, HANDBAG, POUCH, SHOE, SHOES, SANDAL,
  BOOTS, BOOT, NECKTIE, EYEGLASSES, SUNGLASSES, SARI, COAT, GOGGLES, CAP, SCARF, GLOVES, SOCKS, SWIMSUIT, BRIEFS,
  SHORTS, VEST, UNIFORM, CROWN, HELMET, SKATE, GLOVE
"""
"""The first label with a word that the name has is taken; "=" demands the whole name. What none knows is an object."""


def rules() -> Iterator[tuple[str, str]]:
    """(label, word) in order."""
    found = ""
    for line in RULES.strip().splitlines():
        if not line.startswith(" "):
            found, line = line.split(": ")
        yield from ((found, word) for word in line.strip(" ,").split(", "))


def label(name: str) -> str:
    """The label of a Unicode name; a name of several joined by " + " goes by its first."""
    first = name.split(" + ")[0]
    for found, word in rules():
        if first == word[1:] if word.startswith("=") else re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", first):
            return found
    return "object"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a folder of emoji_uXXXX.webp or .png")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="leave out all other labels")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - {"object", *(found for found, _ in rules())}
    if unknown:
        print(f"--only: no label {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if arguments.output.exists():
        print(f"{arguments.output}: exists; name a new folder", file=sys.stderr)
        return 2
    rows = []
    for path in sorted(arguments.images.iterdir()):
        match = FILE.fullmatch(path.name)
        points = [int(point, 16) for point in match[1].split("_")] if match else []
        if points and not VARIANTS & set(points[1:]):
            names = [unicodedata.name(chr(point), "") for point in points if point not in (0x200D, 0xFE0F)]
            name = " + ".join(filter(None, names))
            found = label(name) if name else "object"
            if not arguments.only or found in arguments.only:
                rows.append((path, found, name))
    if not rows:
        print(f"{arguments.images}: holds no such file named like emoji_u1f600.webp", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True)
    for path, _, _ in rows:
        shutil.copyfile(path, arguments.output / path.name)
    with (arguments.output / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("file", "label", "name"), *((path.name, found, name) for path, found, name in rows)]
        )
    for found, count in Counter(found for _, found, _ in rows).most_common():
        print(f"{count:5}  {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
