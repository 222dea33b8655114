"""A hand-written table of well-known facts: relations, their prompts, and subject-to-object pairs.

Kept to facts that are settled and have one short answer. Opposites and the like are listed in one direction only, so
that a pair cannot be in the training split one way round and in the evaluation split the other.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is asked; "{}" stands for the subject."""

    prompt: str
    """Ends right before the object."""

    question: str
    """The same as a question, for lettered prompts."""

    pairs: tuple[tuple[str, str], ...]
    """(subject, object), each subject once."""

    answer: str = "{}"
    """How the object is written: words about words stand in quotation marks."""

    paraphrase: str = ""
    """The prompt in words that no training text has; empty where no other form is asked."""

    kinds: tuple[str, str] = ("", "")
    """What subject and object are, as the names of two fields."""


def pairs_of(table: str) -> tuple[tuple[str, str], ...]:
    """The pairs of lines of "subject: object; subject: object"."""
    entries = [entry.strip() for entry in table.replace("\n", " ").split(";") if entry.strip()]
    pairs = [entry.split(": ", 1) for entry in entries]
    return tuple((subject.strip(), target.strip()) for subject, target in pairs)


def relation(
    prompt: str, question: str, paraphrase: str, kinds: tuple[str, str], table: str, *, answer: str = "{}"
) -> Relation:
    """A Relation from a table as pairs_of takes it."""
    return Relation(prompt, question, pairs_of(table), answer, paraphrase, kinds)


RELATIONS: dict[str, Relation] = {
    "capital": relation(
        "The capital of {} is",
        "What is the capital of {}?",
        "{} is governed from the city of",
        ("country", "capital"),
        """
        France: Paris; Spain: Madrid; Italy: Rome; Germany: Berlin; Portugal: Lisbon; Greece: Athens; Austria: Vienna;
        Belgium: Brussels; Ireland: Dublin; Norway: Oslo; Sweden: Stockholm; Finland: Helsinki; Denmark: Copenhagen;
        Poland: Warsaw; Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia; Serbia: Belgrade; Croatia: Zagreb;
        Russia: Moscow; the United Kingdom: London; Iceland: Reykjavik; Switzerland: Bern; Japan: Tokyo; China: Beijing;
        South Korea: Seoul; Thailand: Bangkok; Vietnam: Hanoi; the Philippines: Manila; India: New Delhi;
        Pakistan: Islamabad; Bangladesh: Dhaka; Nepal: Kathmandu; Afghanistan: Kabul; Iran: Tehran; Iraq: Baghdad;
        Saudi Arabia: Riyadh; Syria: Damascus; Lebanon: Beirut; Jordan: Amman; Turkey: Ankara; Egypt: Cairo;
        Libya: Tripoli; Tunisia: Tunis; Algeria: Algiers; Morocco: Rabat; Kenya: Nairobi; Ethiopia: Addis Ababa;
        Ghana: Accra; Senegal: Dakar; Zimbabwe: Harare; Canada: Ottawa; Cuba: Havana; Jamaica: Kingston;
        Argentina: Buenos Aires; Chile: Santiago; Peru: Lima; Colombia: Bogota; Venezuela: Caracas; Ecuador: Quito;
        Uruguay: Montevideo; Brazil: Brasilia; Australia: Canberra; New Zealand: Wellington; Ukraine: Kyiv;
        the Czech Republic: Prague
        """,
    ),
    "us_state_capital": relation(
        "The capital city of the state of {} is",
        "What is the capital city of the state of {}?",
        "The government of the US state of {} sits in the city of",
        ("US state", "capital"),
        """
        Texas: Austin; California: Sacramento; Georgia: Atlanta; Colorado: Denver; Massachusetts: Boston;
        Arizona: Phoenix; Hawaii: Honolulu; Tennessee: Nashville; Ohio: Columbus; Indiana: Indianapolis;
        New York: Albany; Florida: Tallahassee; Illinois: Springfield; Minnesota: Saint Paul; Virginia: Richmond;
        Oregon: Salem; Washington: Olympia; Alaska: Juneau; Utah: Salt Lake City; Wisconsin: Madison;
        Michigan: Lansing; Pennsylvania: Harrisburg; North Carolina: Raleigh; Nevada: Carson City; Iowa: Des Moines;
        Louisiana: Baton Rouge; New Mexico: Santa Fe; Nebraska: Lincoln; Kansas: Topeka; Alabama: Montgomery;
        Mississippi: Jackson; Arkansas: Little Rock; Idaho: Boise; Montana: Helena; Maryland: Annapolis
        """,
    ),
    "element_symbol": relation(
        "The chemical symbol for {} is",
        "What is the chemical symbol for {}?",
        "In the periodic table, {} is abbreviated as",
        ("element", "symbol"),
        """
        hydrogen: H; helium: He; lithium: Li; carbon: C; nitrogen: N; oxygen: O; fluorine: F; neon: Ne; sodium: Na;
        magnesium: Mg; aluminum: Al; silicon: Si; phosphorus: P; sulfur: S; chlorine: Cl; argon: Ar; potassium: K;
        calcium: Ca; titanium: Ti; chromium: Cr; manganese: Mn; iron: Fe; cobalt: Co; nickel: Ni; copper: Cu; zinc: Zn;
        bromine: Br; silver: Ag; tin: Sn; iodine: I; platinum: Pt; gold: Au; mercury: Hg; lead: Pb; uranium: U;
        radium: Ra
        """,
    ),
    "author": relation(
        "The author of {} is",
        "Who is the author of {}?",
        "{} was written by",
        ("book", "author"),
        """
        Romeo and Juliet: William Shakespeare; Pride and Prejudice: Jane Austen; Oliver Twist: Charles Dickens;
        War and Peace: Leo Tolstoy; Don Quixote: Miguel de Cervantes; Moby-Dick: Herman Melville;
        The Great Gatsby: F. Scott Fitzgerald; Frankenstein: Mary Shelley; Dracula: Bram Stoker;
        The Hobbit: J. R. R. Tolkien; Crime and Punishment: Fyodor Dostoevsky; Les Miserables: Victor Hugo;
        Jane Eyre: Charlotte Bronte; Wuthering Heights: Emily Bronte; Treasure Island: Robert Louis Stevenson;
        The Adventures of Tom Sawyer: Mark Twain; Animal Farm: George Orwell; Brave New World: Aldous Huxley;
        Alice's Adventures in Wonderland: Lewis Carroll; The Jungle Book: Rudyard Kipling; The Odyssey: Homer;
        The Divine Comedy: Dante Alighieri; The Canterbury Tales: Geoffrey Chaucer; Paradise Lost: John Milton;
        Madame Bovary: Gustave Flaubert; The Time Machine: H. G. Wells; Gulliver's Travels: Jonathan Swift;
        Robinson Crusoe: Daniel Defoe; The Old Man and the Sea: Ernest Hemingway; To Kill a Mockingbird: Harper Lee;
        The Metamorphosis: Franz Kafka; Little Women: Louisa May Alcott; The Picture of Dorian Gray: Oscar Wilde
        """,
    ),
    "opposite": relation(
        'The opposite of "{}" is',
        'What is the opposite of "{}"?',
        '"{}" means the contrary of',
        ("word", "opposite"),
        """
        hot: cold; big: small; up: down; left: right; day: night; black: white; good: bad; fast: slow; open: closed;
        happy: sad; rich: poor; full: empty; strong: weak; hard: soft; wet: dry; young: old; tall: short;
        light: dark; early: late; first: last; high: low; love: hate; true: false; begin: end; buy: sell; win: lose;
        push: pull; give: take; north: south; east: west; war: peace; life: death; success: failure;
        inside: outside; clean: dirty; thick: thin; wide: narrow; loud: quiet; smooth: rough; brave: cowardly;
        always: never; accept: reject; arrive: depart; ancient: modern; friend: enemy; increase: decrease;
        maximum: minimum; near: far; positive: negative; possible: impossible; question: answer;
        remember: forget; safe: dangerous; simple: complex; sweet: sour; victory: defeat; yes: no
        """,
        answer='"{}"',
    ),
    "past_tense": relation(
        'The past tense of "{}" is',
        'What is the past tense of "{}"?',
        'Today I "{}", but yesterday I',
        ("verb", "past tense"),
        """
        go: went; eat: ate; see: saw; take: took; give: gave; come: came; run: ran; write: wrote; speak: spoke;
        break: broke; drive: drove; ride: rode; fly: flew; know: knew; grow: grew; throw: threw; draw: drew;
        begin: began; drink: drank; sing: sang; swim: swam; ring: rang; think: thought; buy: bought; bring: brought;
        catch: caught; teach: taught; fight: fought; sleep: slept; keep: kept; feel: felt; leave: left; meet: met;
        feed: fed; hold: held; tell: told; sell: sold; find: found; stand: stood; understand: understood; make: made;
        say: said; pay: paid; build: built; send: sent; spend: spent; lose: lost; win: won; sit: sat; forget: forgot;
        choose: chose; freeze: froze; steal: stole; wake: woke; wear: wore; fall: fell; hide: hid; shake: shook
        """,
        answer='"{}"',
    ),
    "plural": relation(
        'The plural of "{}" is',
        'What is the plural of "{}"?',
        'There is one "{}" here, and over there are two',
        ("singular", "plural"),
        """
        child: children; man: men; woman: women; foot: feet; tooth: teeth; mouse: mice; goose: geese; ox: oxen;
        leaf: leaves; knife: knives; wife: wives; wolf: wolves; half: halves; shelf: shelves; loaf: loaves;
        thief: thieves; city: cities; baby: babies; party: parties; berry: berries; box: boxes; church: churches;
        dish: dishes; bus: buses; hero: heroes; potato: potatoes; tomato: tomatoes; crisis: crises; analysis: analyses;
        phenomenon: phenomena; bacterium: bacteria; criterion: criteria
        """,
        answer='"{}"',
    ),
    "young_animal": relation(
        "A baby {} is called a",
        "What is a baby {} called?",
        "The young of a {} is a",
        ("animal", "young"),
        """
        dog: puppy; cat: kitten; cow: calf; horse: foal; sheep: lamb; goat: kid; pig: piglet; bear: cub; deer: fawn;
        kangaroo: joey; duck: duckling; goose: gosling; hen: chick; swan: cygnet; frog: tadpole; butterfly: caterpillar
        """,
    ),
    "currency": relation(
        "The currency of {} is the",
        "What is the currency of {}?",
        "In {}, people pay with the",
        ("country", "currency"),
        """
        Japan: yen; the United Kingdom: pound; the United States: dollar; Germany: euro; India: rupee; China: yuan;
        Russia: ruble; Mexico: peso; Switzerland: franc; Sweden: krona; Brazil: real; South Korea: won;
        South Africa: rand; Turkey: lira; Thailand: baht; Israel: shekel; Poland: zloty; Hungary: forint;
        Saudi Arabia: riyal; Vietnam: dong; Kuwait: dinar; Peru: sol; Bangladesh: taka; Malaysia: ringgit;
        Nigeria: naira; Indonesia: rupiah; Ukraine: hryvnia; Kenya: shilling
        """,
    ),
    "language": relation(
        "The most widely spoken language in {} is",
        "What is the most widely spoken language in {}?",
        "Most people in {} speak",
        ("country", "language"),
        """
        France: French; Germany: German; Italy: Italian; Japan: Japanese; Russia: Russian; Brazil: Portuguese;
        Mexico: Spanish; Egypt: Arabic; Greece: Greek; Poland: Polish; Sweden: Swedish; Norway: Norwegian;
        Denmark: Danish; Finland: Finnish; Hungary: Hungarian; Turkey: Turkish; Thailand: Thai; Vietnam: Vietnamese;
        South Korea: Korean; Iran: Persian; Israel: Hebrew; the Netherlands: Dutch; Romania: Romanian;
        Bulgaria: Bulgarian; Australia: English; Ukraine: Ukrainian; Bangladesh: Bengali; Iceland: Icelandic
        """,
    ),
    "study": relation(
        "The scientific study of {} is called",
        "What is the scientific study of {} called?",
        "The science that deals with {} is",
        ("subject", "science"),
        """
        living things: biology; plants: botany; animals: zoology; the mind: psychology; rocks: geology;
        insects: entomology; stars and planets: astronomy; weather: meteorology; fossils: paleontology;
        birds: ornithology; heredity: genetics; earthquakes: seismology; fungi: mycology; language: linguistics;
        human societies: sociology; the oceans: oceanography; the nervous system: neuroscience;
        crime: criminology; viruses: virology
        """,
    ),
    "landmark": relation(
        "{} is located in the city of",
        "In which city is {} located?",
        "To visit {}, one has to travel to",
        ("sight", "city"),
        """
        The Eiffel Tower: Paris; Big Ben: London; The Colosseum: Rome; The Statue of Liberty: New York;
        The Brandenburg Gate: Berlin; The Acropolis: Athens; The Kremlin: Moscow; The Sagrada Familia: Barcelona;
        The Golden Gate Bridge: San Francisco; The White House: Washington; The Forbidden City: Beijing;
        The Burj Khalifa: Dubai; The Taj Mahal: Agra; The Space Needle: Seattle; The Prado Museum: Madrid;
        The Anne Frank House: Amsterdam; The Hagia Sophia: Istanbul; Edinburgh Castle: Edinburgh
        """,
    ),
    "continent": relation(
        "The continent on which {} lies is",
        "On which continent does {} lie?",
        "On a map of the world, {} is found in",
        ("country", "continent"),
        """
        France: Europe; Poland: Europe; Sweden: Europe; Kenya: Africa; Nigeria: Africa; Ghana: Africa; Morocco: Africa;
        Japan: Asia; India: Asia; Vietnam: Asia; Nepal: Asia; Mongolia: Asia; Canada: North America;
        Mexico: North America; Honduras: North America; Brazil: South America; Peru: South America;
        Chile: South America; Bolivia: South America
        """,
    ),
    "female": relation(
        'The female counterpart of "{}" is',
        'What is the female counterpart of "{}"?',
        'A man is a "{}", and a woman is a',
        ("male", "female"),
        """
        king: queen; prince: princess; husband: wife; father: mother; son: daughter; brother: sister; uncle: aunt;
        nephew: niece; actor: actress; waiter: waitress; boy: girl; grandfather: grandmother; bull: cow; rooster: hen;
        stallion: mare; duke: duchess; hero: heroine; widower: widow; groom: bride; lord: lady
        """,
        answer='"{}"',
    ),
}
