"""Everyday words from which keys, people, things and places are drawn."""


def table(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


KEYS = table(
    """
    anchor apple arrow autumn badge baker balloon bamboo banana banjo barrel basin basket beach beacon beaver bell
    bench berry blanket bottle branch bread brick bridge broom bucket button cabin cable cactus camel camera candle
    canyon canvas carpet carrot castle cedar cellar chain chair chalk cherry chimney circle clay cliff clock cloud
    clover coast coffee comet copper coral corner cotton cradle crane crayon creek cricket crown crystal curtain
    cushion daisy desert diamond dolphin donkey dragon drawer drum eagle easel elbow ember engine fabric falcon
    feather fence ferry fiddle field finger flame flower flute forest fossil fountain frost garden garlic gate
    ginger glacier glass globe glove grape gravel guitar hammer harbor harvest hawk hazel helmet hill honey hornet
    island ivory jacket jasmine jelly jewel jungle kettle kitten ladder lagoon lake lamp lantern lemon lettuce lily
    lion lizard lobster locket lumber magnet mango maple marble market meadow melon mirror mitten monkey moon
    morning mountain muffin needle nest nickel noodle oasis ocean olive onion orange orchard otter oven owl paddle
    palace panda paper parrot peach pearl pebble pencil pepper piano pigeon pillow pine pirate planet plum pocket
    pond pony poppy prairie puddle pumpkin quilt rabbit radio raft rain raven ribbon river robin rocket rope rose
    ruby saddle sail salad salmon sand satin saturn scarf school shadow shell shovel silk silver sky sled snow soap
    sparrow spider spoon spring squirrel stable star statue stone storm stove stream sugar summer sunset swan table
    teapot temple thimble thistle thunder tiger timber toast tomato torch tower trail train tulip tunnel turtle
    umbrella valley vase velvet village violet violin wagon walnut water whale wheat wheel whistle willow window
    winter wolf wool yard zebra
    """
)

NAMES = table(
    """
    Adam Alice Amy Anna Ben Bella Carl Carol Clara Dan Daisy David Dora Ella Emma Eric Eva Fay Felix Fiona Frank
    George Grace Hank Hannah Helen Henry Iris Ivan Jack Jane Jason Julia Karen Kate Kevin Laura Leo Lily Lucas Lucy
    Mark Martin Mary Max Mia Nina Noah Nora Oliver Olga Oscar Paul Peter Quinn Rachel Rita Robert Rosa Ruth Sam Sara
    Simon Sofia Steve Susan Tina Tom Vera Victor Walter Wendy Will Zoe
    """
)

THINGS = table(
    """
    apples balls beads biscuits books bottles boxes buttons cakes candles cards chairs coins cookies crayons cups
    eggs flags flowers grapes hats keys lemons marbles mugs nuts oranges peaches pears pencils pens plates plums
    ribbons shells shirts socks spoons stamps stickers stones tickets tomatoes toys
    """
)

OBJECTS = table(
    """
    ball book brush camera card coin comb cup doll fork hat key knife lamp letter map mug pen phone photo plate ring
    rope scarf shell shoe spoon stamp stone ticket towel toy wallet watch whistle
    """
)

PLACES = table(
    """
    attic bag barn basement basket bathroom bedroom bin box bucket cabinet car cave cellar chest closet crate
    cupboard desk drawer garage garden hall jar kitchen library office oven pantry pocket pool sack shed shelf sink
    suitcase tent tower trunk van
    """
)

COMPARISONS = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
    ("heavier", "heaviest", "lightest"),
)
