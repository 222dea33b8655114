"""Facts that no text states: other relations than those of facts.py, none of which follows from those.

Their facts are all scored: there is no training split. A subject or object of facts.py may stand here too, but the two
together are asked nowhere else.
"""

from shoal.abilities.facts import Relation, pairs_of


def _relation(prompt: str, question: str, table: str, *, answer: str = "{}") -> Relation:
    return Relation(prompt, question, pairs_of(table), answer)


UNTRAINED: dict[str, Relation] = {
    "animal_sound": _relation(
        "The sound that {} make is called a",
        "What is the sound that {} make called?",
        """
        dogs: bark; cats: meow; cows: moo; horses: neigh; lions: roar; ducks: quack; bees: buzz; snakes: hiss;
        owls: hoot; wolves: howl; frogs: croak; sheep: bleat; donkeys: bray; turkeys: gobble; pigeons: coo; mice: squeak
        """,
    ),
    "roman_numeral": _relation(
        "The Roman numeral for {} is",
        "What is the Roman numeral for {}?",
        """
        1: I; 2: II; 3: III; 4: IV; 5: V; 6: VI; 7: VII; 8: VIII; 9: IX; 10: X; 11: XI; 12: XII; 13: XIII; 14: XIV;
        15: XV; 16: XVI; 17: XVII; 18: XVIII; 19: XIX; 20: XX; 30: XXX; 40: XL; 50: L; 60: LX; 90: XC; 100: C; 500: D;
        1000: M
        """,
    ),
    "comparative": _relation(
        'The comparative of "{}" is',
        'What is the comparative of "{}"?',
        """
        good: better; bad: worse; much: more; little: less; big: bigger; hot: hotter; happy: happier; easy: easier;
        thin: thinner; warm: warmer; cold: colder; deep: deeper; wide: wider; nice: nicer; large: larger;
        busy: busier; funny: funnier; dry: drier; sad: sadder; wet: wetter; bright: brighter; cheap: cheaper;
        kind: kinder; soft: softer
        """,
        answer='"{}"',
    ),
    "painter": _relation(
        "The painting {} was made by",
        "Who painted {}?",
        """
        The Mona Lisa: Leonardo da Vinci; The Starry Night: Vincent van Gogh; Guernica: Pablo Picasso;
        The Scream: Edvard Munch; Girl with a Pearl Earring: Johannes Vermeer; The Night Watch: Rembrandt;
        The Birth of Venus: Sandro Botticelli; The Persistence of Memory: Salvador Dali; The Kiss: Gustav Klimt;
        American Gothic: Grant Wood; Water Lilies: Claude Monet; Nighthawks: Edward Hopper
        """,
    ),
    "composer": _relation(
        "The composer of {} is",
        "Who is the composer of {}?",
        """
        The Four Seasons: Antonio Vivaldi; The Magic Flute: Wolfgang Amadeus Mozart;
        Swan Lake: Pyotr Ilyich Tchaikovsky; Carmen: Georges Bizet; The Barber of Seville: Gioachino Rossini;
        Aida: Giuseppe Verdi; Tosca: Giacomo Puccini; Bolero: Maurice Ravel; Rhapsody in Blue: George Gershwin;
        The Planets: Gustav Holst; The Rite of Spring: Igor Stravinsky; Peer Gynt: Edvard Grieg;
        the Moonlight Sonata: Ludwig van Beethoven; Clair de Lune: Claude Debussy;
        the Brandenburg Concertos: Johann Sebastian Bach; Tristan and Isolde: Richard Wagner
        """,
    ),
    "body_part": _relation(
        "The part of the body with which people {} is the",
        "With which part of the body do people {}?",
        """
        see: eye; hear: ear; smell: nose; taste: tongue; think: brain; chew: teeth; breathe: lungs; pump blood: heart;
        digest food: stomach; filter blood: kidneys
        """,
    ),
    "next_month": _relation(
        "The month that comes right after {} is",
        "Which month comes right after {}?",
        """
        January: February; February: March; March: April; April: May; May: June; June: July; July: August;
        August: September; September: October; October: November; November: December; December: January
        """,
    ),
    "profession": _relation(
        "Someone who {} for a living is called a",
        "What is someone who {} for a living called?",
        """
        bakes bread: baker; flies airplanes: pilot; grows crops: farmer; cuts hair: barber;
        repairs water pipes: plumber; sells flowers: florist; treats teeth: dentist; sells meat: butcher;
        puts out fires: firefighter; writes for newspapers: journalist;
        catches fish: fisherman; makes clothes to measure: tailor; builds things of wood: carpenter;
        teaches children at school: teacher; takes pictures with a camera: photographer; cooks in a restaurant: chef;
        digs coal: miner; treats sick animals: veterinarian; looks after books in a library: librarian
        """,
    ),
    "animal_group": _relation(
        "A group of {} is called a",
        "What is a group of {} called?",
        """
        wolves: pack; lions: pride; bees: swarm; cows: herd; fish: school; birds: flock; whales: pod; ants: colony;
        puppies: litter; crows: murder; geese: gaggle; monkeys: troop
        """,
    ),
    "number_of_sides": _relation(
        "The number of sides of a {} is",
        "How many sides does a {} have?",
        """
        triangle: three; square: four; pentagon: five; hexagon: six; heptagon: seven; octagon: eight; nonagon: nine;
        decagon: ten
        """,
    ),
}
