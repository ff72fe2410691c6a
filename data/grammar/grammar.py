"""
A small English-German grammar that writes sentence pairs. It is a toy, not a corpus: some 250 words of each
language, 590 English and 1,330 German forms, in unnatural company. What it keeps from the real thing is
what makes German hard:

    word order    the finite verb is second in a main clause, first in a question, last after weil or dass;
                  participles, infinitives and the prefix of a separable verb close the clause
                      Today the king opens the window.           Heute macht der König das Fenster auf.
                      ... because the king opens the window      ..., weil der König das Fenster aufmacht
    case          three cases, three genders and two numbers in the article, the adjective and the noun
                      a dog gives the old man a red ball         ein Hund gibt dem alten Mann einen roten Ball
    numerals      units before tens, in one word
                      three hundred and forty-two                dreihundertzweiundvierzig

German is a function of English here: "you" is always du, the past of a verb is always the German perfect, and
so on. So each source has one right translation, and exact match is a fair score. The reverse is not true.
"""
import random
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# Lexicon. Nouns of the weak declension (der Junge, den Jungen) and English verbs whose past looks like the
# present (read, put) are left out on purpose.

NOUNS = {   # English singular, plural; German singular, gender, plural
    "person": """
        man men Mann m Männer, woman women Frau f Frauen, child children Kind n Kinder,
        friend friends Freund m Freunde, teacher teachers Lehrer m Lehrer, doctor doctors Arzt m Ärzte,
        girl girls Mädchen n Mädchen, mother mothers Mutter f Mütter, father fathers Vater m Väter,
        son sons Sohn m Söhne, daughter daughters Tochter f Töchter, brother brothers Bruder m Brüder,
        sister sisters Schwester f Schwestern, aunt aunts Tante f Tanten, uncle uncles Onkel m Onkel,
        king kings König m Könige, queen queens Königin f Königinnen, baker bakers Bäcker m Bäcker,
        guest guests Gast m Gäste, gardener gardeners Gärtner m Gärtner, painter painters Maler m Maler,
        thief thieves Dieb m Diebe, judge judges Richter m Richter, pupil pupils Schüler m Schüler,
        baby babies Baby n Babys""",
    "animal": """
        dog dogs Hund m Hunde, cat cats Katze f Katzen, horse horses Pferd n Pferde,
        bird birds Vogel m Vögel, cow cows Kuh f Kühe, mouse mice Maus f Mäuse,
        pig pigs Schwein n Schweine, duck ducks Ente f Enten, wolf wolves Wolf m Wölfe,
        goat goats Ziege f Ziegen, frog frogs Frosch m Frösche""",
    "thing": """
        book books Buch n Bücher, letter letters Brief m Briefe, table tables Tisch m Tische,
        chair chairs Stuhl m Stühle, lamp lamps Lampe f Lampen, clock clocks Uhr f Uhren,
        picture pictures Bild n Bilder, car cars Auto n Autos, bicycle bicycles Fahrrad n Fahrräder,
        boat boats Boot n Boote, ball balls Ball m Bälle, box boxes Kiste f Kisten,
        bag bags Tasche f Taschen, key keys Schlüssel m Schlüssel, knife knives Messer n Messer,
        spoon spoons Löffel m Löffel, fork forks Gabel f Gabeln, glass glasses Glas n Gläser,
        bottle bottles Flasche f Flaschen, cup cups Tasse f Tassen, plate plates Teller m Teller,
        hat hats Hut m Hüte, coat coats Mantel m Mäntel, shirt shirts Hemd n Hemden,
        dress dresses Kleid n Kleider, shoe shoes Schuh m Schuhe, ring rings Ring m Ringe,
        coin coins Münze f Münzen, newspaper newspapers Zeitung f Zeitungen, door doors Tür f Türen,
        window windows Fenster n Fenster, flower flowers Blume f Blumen, violin violins Geige f Geigen,
        umbrella umbrellas Regenschirm m Regenschirme, basket baskets Korb m Körbe,
        stone stones Stein m Steine""",
    "food": """
        apple apples Apfel m Äpfel, pear pears Birne f Birnen, cake cakes Kuchen m Kuchen,
        egg eggs Ei n Eier, potato potatoes Kartoffel f Kartoffeln, tomato tomatoes Tomate f Tomaten,
        nut nuts Nuss f Nüsse, sausage sausages Wurst f Würste, onion onions Zwiebel f Zwiebeln,
        orange oranges Orange f Orangen""",
    "place": """
        house houses Haus n Häuser, garden gardens Garten m Gärten, kitchen kitchens Küche f Küchen,
        school schools Schule f Schulen, city cities Stadt f Städte, village villages Dorf n Dörfer,
        forest forests Wald m Wälder, room rooms Zimmer n Zimmer, museum museums Museum n Museen,
        church churches Kirche f Kirchen, park parks Park m Parks, castle castles Schloss n Schlösser,
        factory factories Fabrik f Fabriken, office offices Büro n Büros, cellar cellars Keller m Keller,
        tower towers Turm m Türme, valley valleys Tal n Täler"""}

ADJECTIVES = {   # English, German as a predicate, German stem before an ending if it is another
    "any": """
        old alt, big groß, small klein, beautiful schön, good gut, strange seltsam, famous berühmt""",
    "living": """
        young jung, poor arm, rich reich, friendly freundlich, happy glücklich, sad traurig,
        tired müde müd, angry wütend, hungry hungrig, strong stark, weak schwach, brave mutig,
        clever klug, lazy faul""",
    "dead": """
        new neu, red rot, blue blau, green grün, yellow gelb, brown braun, white weiß, black schwarz,
        dirty schmutzig, ugly hässlich, heavy schwer, cheap billig, expensive teuer teur, clean sauber,
        dark dunkel dunkl, empty leer, cold kalt, wet nass, dry trocken"""}

# English base and past; German infinitive (a bar after a separable prefix), third person, participle; "s" at
# the end if the perfect is formed with sein
VERBS = {
    "no object": """
        rest rested / ruhen ruht geruht, work worked / arbeiten arbeitet gearbeitet,
        play played / spielen spielt gespielt, wait waited / warten wartet gewartet,
        laugh laughed / lachen lacht gelacht, cry cried / weinen weint geweint,
        dance danced / tanzen tanzt getanzt, sing sang / singen singt gesungen,
        swim swam / schwimmen schwimmt geschwommen s, smile smiled / lächeln lächelt gelächelt,
        stay stayed / bleiben bleibt geblieben s,
        disappear disappeared / verschwinden verschwindet verschwunden s,
        fall_asleep fell_asleep / ein|schlafen schläft eingeschlafen s,
        wake_up woke_up / auf|wachen wacht aufgewacht s, get_up got_up / auf|stehen steht aufgestanden s,
        arrive arrived / an|kommen kommt angekommen s,
        come_back came_back / zurück|kommen kommt zurückgekommen s,
        go_away went_away / weg|gehen geht weggegangen s, listen listened / zu|hören hört zugehört,
        take_part took_part / teil|nehmen nimmt teilgenommen""",
    "any": """
        see saw / sehen sieht gesehen, find found / finden findet gefunden,
        draw drew / zeichnen zeichnet gezeichnet, forget forgot / vergessen vergisst vergessen,
        carry carried / tragen trägt getragen, know knew / kennen kennt gekannt,
        love loved / lieben liebt geliebt, admire admired / bewundern bewundert bewundert,
        describe described / beschreiben beschreibt beschrieben,
        hide hid / verstecken versteckt versteckt, need needed / brauchen braucht gebraucht,
        look_for looked_for / suchen sucht gesucht, watch watched / beobachten beobachtet beobachtet""",
    "person": """
        visit visited / besuchen besucht besucht, greet greeted / grüßen grüßt gegrüßt,
        hear heard / hören hört gehört, understand understood / verstehen versteht verstanden,
        ask asked / fragen fragt gefragt, comfort comforted / trösten tröstet getröstet,
        meet met / treffen trifft getroffen, invite invited / ein|laden lädt eingeladen,
        call called / an|rufen ruft angerufen, fetch fetched / ab|holen holt abgeholt,
        introduce introduced / vor|stellen stellt vorgestellt""",
    "thing": """
        buy bought / kaufen kauft gekauft, sell sold / verkaufen verkauft verkauft,
        lose lost / verlieren verliert verloren, steal stole / stehlen stiehlt gestohlen,
        wash washed / waschen wäscht gewaschen, repair repaired / reparieren repariert repariert,
        open opened / auf|machen macht aufgemacht, close closed / zu|machen macht zugemacht,
        choose chose / aus|suchen sucht ausgesucht,
        bring_along brought_along / mit|bringen bringt mitgebracht,
        throw_away threw_away / weg|werfen wirft weggeworfen,
        give_back gave_back / zurück|geben gibt zurückgegeben,
        pick_up picked_up / auf|heben hebt aufgehoben""",
    "food": """
        eat ate / essen isst gegessen, cook cooked / kochen kocht gekocht,
        try tried / probieren probiert probiert, peel peeled / schälen schält geschält,
        order ordered / bestellen bestellt bestellt""",
    "dative": """
        help helped / helfen hilft geholfen, thank thanked / danken dankt gedankt,
        answer answered / antworten antwortet geantwortet, trust trusted / vertrauen vertraut vertraut,
        follow followed / folgen folgt gefolgt s,
        congratulate congratulated / gratulieren gratuliert gratuliert,
        listen_to listened_to / zu|hören hört zugehört""",
    "dative and thing": """
        give gave / geben gibt gegeben, show showed / zeigen zeigt gezeigt,
        send sent / schicken schickt geschickt, lend lent / leihen leiht geliehen,
        bring brought / bringen bringt gebracht, offer offered / an|bieten bietet angeboten,
        promise promised / versprechen verspricht versprochen""",
    "that": """
        say said / sagen sagt gesagt, believe believed / glauben glaubt geglaubt,
        hope hoped / hoffen hofft gehofft, know knew / wissen weiß gewusst,
        dream dreamed / träumen träumt geträumt, write wrote / schreiben schreibt geschrieben"""}

MODALS = {   # German forms for ich, du, er, wir, sie
    "can": "kann kannst kann können können", "must": "muss musst muss müssen müssen",
    "want to": "will willst will wollen wollen", "should": "soll sollst soll sollen sollen",
    "may": "darf darfst darf dürfen dürfen", "will": "werde wirst wird werden werden"}

PRONOUNS = {   # person: English subject, object; German nominative, accusative, dative
    "I": "I me ich mich mir", "you": "you you du dich dir", "he": "he him er ihn ihm",
    "she": "she her sie sie ihr", "we": "we us wir uns uns", "they": "they them sie sie ihnen"}
POSSESSIVES = {"my": "mein", "your": "dein", "his": "sein", "her": "ihr", "our": "unser", "their": "ihr"}
TIMES = {   # what goes with a tense; "any" with all
    "present": "today / heute, now / jetzt, every day / jeden Tag, often / oft",
    "past": "yesterday / gestern, last week / letzte Woche, last year / letztes Jahr",
    "modal": "tomorrow / morgen, soon / bald, next week / nächste Woche, today / heute",
    "any": """in the morning / am Morgen, in the evening / am Abend, at night / in der Nacht,
        on Monday / am Montag, on Wednesday / am Mittwoch, on Friday / am Freitag, on Sunday / am Sonntag,
        in May / im Mai, in summer / im Sommer, in winter / im Winter"""}
PLACES = [("in", "in"), ("in", "in"), ("behind", "hinter"), ("in front of", "vor"), ("next to", "neben")]
CONJUNCTIONS = {"because": "weil", "although": "obwohl", "while": "während", "if": "wenn", "before": "bevor"}
QUESTIONS = {"why": "warum", "when": "wann", "how often": "wie oft"}


def table(text):
    return [entry.split() for entry in text.split(",")]


def phrases(text):
    return [tuple(part.strip() for part in entry.split("/")) for entry in text.split(",")]


# --------------------------------------------------------------------------------------------------
# Numerals

UNITS = [("", ""), ("one", "ein"), ("two", "zwei"), ("three", "drei"), ("four", "vier"), ("five", "fünf"),
         ("six", "sechs"), ("seven", "sieben"), ("eight", "acht"), ("nine", "neun"), ("ten", "zehn"),
         ("eleven", "elf"), ("twelve", "zwölf"), ("thirteen", "dreizehn"), ("fourteen", "vierzehn"),
         ("fifteen", "fünfzehn"), ("sixteen", "sechzehn"), ("seventeen", "siebzehn"),
         ("eighteen", "achtzehn"), ("nineteen", "neunzehn")]
TENS = [("twenty", "zwanzig"), ("thirty", "dreißig"), ("forty", "vierzig"), ("fifty", "fünfzig"),
        ("sixty", "sechzig"), ("seventy", "siebzig"), ("eighty", "achtzig"), ("ninety", "neunzig")]


def numeral(n):
    """(English, German) of 1 <= n < 1,000,000. A final one is "ein", as inside a longer numeral."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        (en, de), (unit_en, unit_de) = TENS[n // 10 - 2], UNITS[n % 10]
        return (f"{en}-{unit_en}", f"{unit_de}und{de}") if n % 10 else (en, de)
    size, en, de = (1000, "thousand", "tausend") if n >= 1000 else (100, "hundred", "hundert")
    head, rest = numeral(n // size), n % size
    if not rest:
        return f"{head[0]} {en}", head[1] + de
    tail = numeral(rest)
    return f"{head[0]} {en} {'and ' if rest < 100 else ''}{tail[0]}", head[1] + de + tail[1]


# --------------------------------------------------------------------------------------------------
# Noun phrases: the article or the adjective must show gender, number and case

STRONG = {"nom": dict(m="er", f="e", n="es", p="e"), "acc": dict(m="en", f="e", n="es", p="e"),
          "dat": dict(m="em", f="er", n="em", p="en")}       # p: plural, where gender makes no difference
THE = {"nom": dict(m="der", f="die", n="das", p="die"), "acc": dict(m="den", f="die", n="das", p="die"),
       "dat": dict(m="dem", f="der", n="dem", p="den")}


def determiner(en, case, gender):
    """German for the determiner `en`, and whether it carries an ending that shows the case."""
    if en in ("the", "this", "these"):
        return THE[case][gender] if en == "the" else "dies" + STRONG[case][gender], True
    stem = {"a": "ein", "not a": "kein", **POSSESSIVES}.get(en)
    if stem is None:
        return en, False                                     # a numeral has no ending
    bare = gender == "n" and case != "dat" or gender == "m" and case == "nom"
    return (stem, False) if bare else (stem + STRONG[case][gender], True)


class NounPhrase(NamedTuple):
    """A phrase in both languages, in every case it may stand in."""
    en: str
    de: dict                       # {"nom": ..., "acc": ..., "dat": ...}
    who: str                       # the person it is for a verb: I, you, he (any singular), we, they
    me: str = ""                   # a pronoun's English object form


def noun_phrase(det, adjective, noun, plural=False):
    """
    det: the, this, these, a, "not a", my, your, ..., or an (English, German) numeral. adjective: a row of
    ADJECTIVES or None. noun: a row of NOUNS. The adjective's ending is weak after a determiner that has one;
    otherwise the adjective has to show the case.
    """
    one, many, de_one, gender, de_many = noun
    gender = "p" if plural else gender
    en_det, de_det = det if isinstance(det, tuple) else (det, det)
    de = {}
    for case in STRONG:
        word, shown = determiner(de_det, case, gender)
        words = [word]
        if adjective:
            weak = "e" if case == "nom" and not plural or case == "acc" and gender in "fn" else "en"
            words.append(adjective[-1] + (weak if shown else STRONG[case][gender]))
        words.append(de_many if plural else de_one)
        if case == "dat" and plural and words[-1][-1] not in "ns":
            words[-1] += "n"
        de[case] = " ".join(words)
    rest = (f"{adjective[0]} " if adjective else "") + (many if plural else one)
    en_det = "a" if en_det == "not a" else en_det
    if en_det == "a" and rest[0] in "aeiou":
        en_det = "an"
    return NounPhrase(f"{en_det} {rest}", de, "they" if plural else "he")


def pronoun(person):
    subject, object, nom, acc, dat = PRONOUNS[person].split()
    return NounPhrase(subject, dict(nom=nom, acc=acc, dat=dat), "he" if person == "she" else person, object)


# --------------------------------------------------------------------------------------------------
# Clauses

class Clause(NamedTuple):
    """What a clause says, before either language puts it in order."""
    subject: NounPhrase
    verb: list                     # row of VERBS, or None: to be
    tense: str = "present"         # "present", "past" or a modal
    dative: NounPhrase = None
    accusative: NounPhrase = None
    time: tuple = None             # (English, German)
    place: tuple = None            # (English, German)
    predicate: tuple = None        # after to be: (English, German)
    negated: bool = False
    kein: bool = False             # the negation is in the object's article


def third_person(verb):
    """see -> sees, carry -> carries, wake up -> wakes up"""
    head, _, tail = verb.partition(" ")
    if head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "es" if head.endswith(("s", "sh", "ch", "x", "o")) else "s"
    return f"{head} {tail}".strip()


def english(c, question=False):
    """The words of a clause in English order; a question has its auxiliary before the subject."""
    subject, he = c.subject.en, c.subject.who == "he"
    if c.verb is None:
        present = {"I": "am", "he": "is"}.get(c.subject.who, "are")
        aux, verb = present if c.tense == "present" else "was" if he or c.subject.who == "I" else "were", ""
    else:
        base, past = (word.replace("_", " ") for word in c.verb[:2])
        aux, verb = c.tense, base
        if c.tense == "want to":
            aux, verb = "present", "want to " + base
        if aux in ("present", "past"):
            if question or c.negated:
                aux = "did" if aux == "past" else "does" if he else "do"
            else:
                aux, verb = "", past if aux == "past" else third_person(verb) if he else verb
    words = [aux, subject] if question else [subject, aux]
    words += ["not"] * c.negated + [verb] + [o.me or o.en for o in (c.dative, c.accusative) if o]
    words += [part[0] for part in (c.predicate, c.place, c.time) if part]
    return " ".join(word for word in words if word)


def conjugate(infinitive, er, who):
    """The present form of a German verb; er: its third person singular, which has the vowel of du as well."""
    if who == "he":
        return er
    if who in ("we", "they"):
        return infinitive
    if not er.endswith("t"):                                 # weiß: ich weiß, du weißt
        return er + "t" * (who == "you")
    if who == "you":
        return er if er[-2] in "sßz" else er[:-1] + "st"
    if infinitive.endswith("eln"):
        return infinitive[:-3] + "le"                        # lächeln: ich lächle
    return infinitive.removesuffix("n").removesuffix("e") + "e"


def german(c, order="second", front=None):
    """
    The words of a clause in German order: the finite verb "second" (with the subject or `front` before it),
    "first" (in a question) or "last" (in a subordinate clause).
    """
    who = c.subject.who
    sein = dict(I="bin", you="bist", he="ist", we="sind", they="sind")
    prefix, end = "", []
    if c.verb is None:
        finite = sein[who] if c.tense == "present" else dict(I="war", you="warst", he="war").get(who, "waren")
    else:
        prefix, _, infinitive = c.verb[2].rpartition("|")
        if c.tense == "present":
            finite = conjugate(infinitive, c.verb[3], who)
        elif c.tense == "past":
            haben = dict(I="habe", you="hast", he="hat").get(who, "haben")
            finite, end, prefix = sein[who] if c.verb[-1] == "s" else haben, [c.verb[4]], ""
        else:
            forms = dict(zip(("I", "you", "he", "we", "they"), MODALS[c.tense].split()))
            finite, end, prefix = forms[who], [prefix + infinitive], ""
    objects = [(o.me, o.de[case]) for o, case in ((c.dative, "dat"), (c.accusative, "acc")) if o]
    middle = [text for me, text in objects if me]            # pronouns, time, nouns, not, place
    middle += [c.time[1]] if c.time else []
    middle += [text for me, text in objects if not me] + ["nicht"] * (c.negated and not c.kein)
    middle += [part[1] for part in (c.place, c.predicate) if part]
    subject = c.subject.de["nom"]
    if order == "last":
        words = [subject, *middle, *end, prefix + finite]
    else:
        end += [prefix] * bool(prefix)
        start = [subject, finite] if order == "second" and not front else [front, finite, subject]
        words = [*filter(None, start), *middle, *end]
    return " ".join(words)


# --------------------------------------------------------------------------------------------------
# Drawing sentences

NOUNS = {kind: table(text) for kind, text in NOUNS.items()}
ADJECTIVES = {kind: table(text) for kind, text in ADJECTIVES.items()}
VERBS = {kind: table(text.replace("/", "")) for kind, text in VERBS.items()}
TIMES = {tense: phrases(text) for tense, text in TIMES.items()}
COST = "cost cost kosten kostet gekostet".split()
LIVING, DEAD = ("person", "person", "animal"), ("thing", "thing", "food")


def draw_number(rng):
    """2 to 999,999, short ones more often. Not 1, 101, ...: a final one would be inflected."""
    digits = rng.choice((1, 1, 2, 2, 2, 2, 3, 3, 4, 6))
    n = rng.randrange(10 ** (digits - 1), 10 ** digits)
    return n + 1 if n % 100 == 1 else n


def draw_noun_phrase(rng, kinds, negated=False):
    """A phrase about one of `kinds` of nouns; an object that a negation may turn from ein into kein."""
    kind = rng.choice(kinds)
    adjective = None
    if rng.random() < 0.3:
        suits = () if kind == "place" else ADJECTIVES["living" if kind in LIVING else "dead"]
        adjective = rng.choice((*ADJECTIVES["any"], *suits))
    noun, det = rng.choice(NOUNS[kind]), rng.choice(("the", "the", "the", "a", "a", "this", "my", "number"))
    plural = rng.random() < 0.3
    if det == "number" and not negated and kind != "place":
        return noun_phrase(numeral(draw_number(rng)), adjective, noun, plural=True)
    if det == "number" or det == "my":
        det = rng.choice(list(POSSESSIVES))
    if det == "a":
        return noun_phrase("not a" if negated else "a", adjective, noun)
    return noun_phrase("these" if det == "this" and plural else det, adjective, noun, plural)


def draw_person(rng, but=None, negated=False):
    """A living being as a phrase or a pronoun. `but`: the subject, which an object must not repeat."""
    person = rng.choice(list(PRONOUNS)) if rng.random() < 0.3 else None
    if not person or but and but.me and (person == but.who or {person, but.who} == {"I", "we"}):
        return draw_noun_phrase(rng, LIVING, negated)
    return pronoun(person)


def draw_place(rng):
    """(English, German): where, or with whom."""
    if rng.random() < 0.3:
        en, de, case = rng.choice((("with", "mit", "dat"), ("without", "ohne", "acc")))
        who = draw_noun_phrase(rng, LIVING)
        return f"{en} {who.en}", f"{de} {who.de[case]}"
    en, de = rng.choice(PLACES)
    where = draw_noun_phrase(rng, ("place",))
    return f"{en} {where.en}", f"{de} {where.de['dat']}".replace("in dem ", "im ")


def draw_clause(rng, negatable=True):
    """A clause with everything but its word order."""
    subject, tense = draw_person(rng), rng.choice(("present", "present", "past", "modal"))
    time = rng.choice(TIMES["any"] + TIMES[tense] * 2) if rng.random() < 0.3 else None
    if tense == "modal":
        tense = rng.choice(list(MODALS))
    negated = negatable and tense not in ("can", "must") and rng.random() < 0.15
    place = draw_place(rng) if rng.random() < 0.2 else None
    c = Clause(subject, None, tense, time=time, place=place, negated=negated)
    kind = rng.choice(("be", "no object", "no object", "any", "any", "person", "person", "thing", "thing",
                       "thing", "food", "dative", "dative and thing", "dative and thing"))
    if kind == "be":
        return draw_state(rng, c._replace(place=None))
    c = c._replace(verb=rng.choice(VERBS[kind]))
    if kind.startswith("dative"):
        c = c._replace(dative=draw_person(rng, but=subject))
    if kind == "person" or kind == "any" and rng.random() < 0.5:
        c = c._replace(accusative=draw_person(rng, subject, negated))
    elif kind in ("any", "thing", "food", "dative and thing"):
        c = c._replace(accusative=draw_noun_phrase(rng, ("food",) if kind == "food" else DEAD, negated))
    return c._replace(kein=bool(c.accusative) and c.accusative.de["acc"].startswith("kein"))


def draw_state(rng, c):
    """To be something, to be so many years old, or to cost so much."""
    tense, sort = rng.choice(("present", "past")), rng.choice(("person", "thing", "age", "price"))
    time = rng.choice(TIMES["any"]) if c.time else None
    en, de = numeral(draw_number(rng))
    if sort == "price":
        price = NounPhrase(f"{en} euros", {"acc": f"{de} Euro"}, "they")
        return Clause(draw_noun_phrase(rng, DEAD), COST, accusative=price, time=time)
    if sort == "age":
        return Clause(draw_noun_phrase(rng, LIVING + DEAD), None, tense,
                      predicate=(f"{en} years old", f"{de} Jahre alt"))
    subject = c.subject if sort == "person" else draw_noun_phrase(rng, DEAD)
    row = rng.choice(ADJECTIVES["living" if sort == "person" else "dead"] + ADJECTIVES["any"])
    return Clause(subject, None, tense, predicate=row[:2], time=time, negated=c.negated)


def main_clause(rng):
    """(English, German) of a main clause. With its time or place in front, German keeps the verb second."""
    c = draw_clause(rng)
    slot = rng.choice(("time", "place"))
    front = getattr(c, slot)
    if front and rng.random() < 0.5:
        c = c._replace(**{slot: None})
        return f"{front[0]} {english(c)}", german(c, front=front[1])
    return english(c), german(c)


def sentence(rng):
    """One (English, German) pair, a function of the random.Random `rng` alone."""
    sort = rng.choice(("main",) * 6 + ("sub", "sub", "sub first", "that", "that", "question", "and"))
    mark = "."
    if sort == "main":
        en, de = main_clause(rng)
    elif sort == "question":
        c, mark = draw_clause(rng, negatable=False), "?"
        en, de = english(c, question=True), german(c, "first")
        if rng.random() < 0.4:
            c, word = c._replace(time=None), rng.choice(list(QUESTIONS))
            en, de = f"{word} {english(c, question=True)}", f"{QUESTIONS[word]} {german(c, 'first')}"
    elif sort == "and":
        (en, de), (en2, de2) = main_clause(rng), main_clause(rng)
        word = rng.choice((("and", " und"), ("but", ", aber")))
        en, de = f"{en} {word[0]} {en2}", f"{de}{word[1]} {de2}"
    elif sort == "that":
        c = Clause(draw_person(rng), rng.choice(VERBS["that"]), rng.choice(("present", "past")))
        sub = draw_clause(rng)
        en, de = f"{english(c)} that {english(sub)}", f"{german(c)}, dass {german(sub, 'last')}"
    else:
        word, sub = rng.choice(list(CONJUNCTIONS)), draw_clause(rng)
        en_sub, de_sub = f"{word} {english(sub)}", f"{CONJUNCTIONS[word]} {german(sub, 'last')}"
        if sort == "sub":
            en, de = main_clause(rng)
            en, de = f"{en} {en_sub}", f"{de}, {de_sub}"
        else:
            c = draw_clause(rng)
            en, de = f"{en_sub}, {english(c)}", f"{de_sub}, {german(c, 'first')}"
    return en[0].upper() + en[1:] + mark, de[0].upper() + de[1:] + mark


def corpus(n, seed=1337):
    """n pairs with n different sources, the same for the same seed."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < n:
        en, de = sentence(rng)
        if pairs.setdefault(en, de) != de:
            raise ValueError(f"the grammar gives '{en}' two translations: '{pairs[en]}' and '{de}'")
    return list(pairs.items())
