"""The little English in which the phantoms think: scenes made of independent factors.

A scene fixes every factor (valence, emotion, intensity, closeness, distance, conflict and ten controls) and
every choice of wording. A user turn tells the scene in two or three sentences and ends with "Reply:"; the
reply that follows comments on a few of the scene's factors, in words that never occur in the user turn.
Each reply sentence opens with a word of its factor, and which factor is taken up first is left to chance:
to predict the first word, a model must hold *all* factors at the final ":". That token is the read position.
It is the same in every text, so no embedding can read a concept from it; bag-of-words can read all of them.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from empathy_probes.errors import InputError

TARGETS = ("valence", "intensity", "closeness", "distance", "conflict")
CONTROLS = (
    "tense", "number", "place", "weather", "transport", "season", "daytime", "material", "drink", "animal",
)  # fmt: skip
CONCEPTS = TARGETS + CONTROLS
EMOTIONS = (("sadness", "anger", "fear", "shame"), ("joy", "pride", "gratitude", "relief"))  # by valence
# What the concepts with more than two labels are made of.
FACTOR = {"emotion": ("valence", "emotion"), "degree": ("intensity",)}
READ_SUFFIX = "Reply:"
OPTIONAL = ("conflict", "place", "weather", "transport", "season", "daytime", "material", "drink", "animal")


def _words(*rows: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(row.split()) for row in rows)


# Two rows are the factor's values 0 and 1 unless said otherwise; the same column of both rows makes a pair.
# Verbs come as past/present. A slot (a table) is filled by one draw, shared by all texts of a scenario.
EVENT = _words(
    "lost/loses broke/breaks ruined/ruins wrecked/wrecks damaged/damages dropped/drops smashed/smashes"
    " destroyed/destroys missed/misses wasted/wastes",
    "won/wins found/finds repaired/repairs saved/saves received/receives recovered/recovers rescued/rescues"
    " restored/restores earned/earns polished/polishes",
)
OUTCOME = _words(
    "groaned/groans frowned/frowns mourned/mourns cried/cries sighed/sighs complained/complains",
    "cheered/cheers smiled/smiles celebrated/celebrates clapped/claps laughed/laughs danced/dances",
)
FEELING = (
    _words("sad gloomy sorrowful unhappy", "angry furious irritated outraged",
           "afraid scared anxious worried", "ashamed guilty embarrassed humiliated"),
    _words("happy cheerful delighted joyful", "proud triumphant accomplished confident",
           "grateful thankful appreciative touched", "relieved reassured calm unburdened"),
)  # fmt: skip
DEGREE = _words(  # four levels, low to high; the binary contrast is level 0 against level 3
    "slightly mildly faintly barely", "somewhat rather moderately fairly", "very quite really notably",
    "utterly extremely immensely overwhelmingly",
)  # fmt: skip
MANNER = _words("quietly softly gently", "audibly visibly clearly",
                "firmly strongly loudly", "wildly fiercely madly")  # fmt: skip
PERSON = _words("a/stranger some/clerk a/passerby one/visitor a/tourist",
                "my/friend my/sister my/buddy my/cousin my/brother")  # fmt: skip
PARTNER = _words("newcomer foreigner outsider unknown", "pal companion mate confidant")
WITNESS = _words("I/saw/see I/noticed/notice I/heard/hear I/knew/know",
                 "It/appeared/appears It/seemed/seems It/emerged/emerges It/transpired/transpires")  # fmt: skip
EXPERIENCER = _words("I I I", "One Someone Somebody")
SIDE = _words("agreed/agree cooperated/cooperate sided/side bonded/bond",
              "argued/argue quarreled/quarrel disagreed/disagree clashed/clash")  # fmt: skip
STANCE = _words("accord harmony support unity", "protest dispute opposition defiance")
COUNT = _words("one this that", "many several these")
THING = _words(
    "box lamp ticket trophy letter map bicycle clock bracelet violin statue medal key camera ring table chair"
    " cup vase bell toy coin frame ladder",
    "boxes lamps tickets trophies letters maps bicycles clocks bracelets violins statues medals keys cameras"
    " rings tables chairs cups vases bells toys coins frames ladders",
)
MATERIAL = _words("metal steel iron copper", "wooden oak pine bamboo")
DETAIL = {  # phrases of the context sentence: what stands before the word, then the two rows
    "place": ("at the", _words("office mall museum factory bank", "farm meadow orchard barn lake")),
    "weather": ("in", _words("sunshine sunlight brightness heat", "rain drizzle fog hail")),
    "transport": ("by", _words("car truck van taxi", "train tram subway metro")),
    "season": ("during", _words("summer June July August", "winter December January February")),
    "daytime": ("around", _words("dinner sunset dusk nightfall", "breakfast sunrise dawn daybreak")),
    "drink": ("with some", _words("juice lemonade soda milkshake", "tea coffee cocoa broth")),
    "animal": ("near a", _words("dog puppy wolf hound", "cat kitten tiger lion")),
}
ACTION = _words("met/meet arrived/arrive waited/wait stayed/stay rested/rest gathered/gather")
GROUP = ("everyone", "the crowd", "the family", "the team", "the village")
ORDERS = ("CEF", "CFE", "ECF", "EFC", "FCE", "FEC")  # context, event, feeling

# What a reply may say about each factor: openers by value, then the rest of the sentence.
REPLY = {
    "intensity": (_words("Little Small Minor", "Huge Massive Enormous"), "stakes."),
    "closeness": (_words("Unfamiliar Distant Nameless", "Beloved Dear Familiar"), "people matter."),
    "distance": (_words("Direct Personal Candid", "Detached Formal Abstract"), "words."),
    "conflict": (_words("Peace Consensus Cooperation", "Tension Friction Rivalry"), "shows."),
    "tense": (_words("Is Feels Looks", "Was Felt Looked"), "it fair?"),
    "number": (_words("Single Lone Sole", "Multiple Numerous Various"), "items."),
    "place": (_words("Urban City Downtown", "Rural Country Village"), "life."),
    "weather": (_words("Dry Sunny Warm", "Wet Damp Rainy"), "skies."),
    "transport": (_words("Road Highway Street", "Rail Track Station"), "trips."),
    "season": (_words("Hot Sweaty Tropical", "Cold Icy Snowy"), "months."),
    "daytime": (_words("Late Evening Night", "Early Morning Daylight"), "hours."),
    "material": (_words("Hard Shiny Forged", "Carved Grainy Natural"), "stuff."),
    "drink": (_words("Chilled Cool Iced", "Steaming Brewed Boiled"), "drinks."),
    "animal": (_words("Canine Barking Loyal", "Feline Purring Whiskered"), "company."),
}
VALENCE_REPLY = _words("Terrible Awful Dreadful Horrible", "Wonderful Splendid Lovely Marvelous")
CLOSING = _words("perhaps maybe", "possibly partly", "surely certainly", "truly absolutely")  # by intensity
EMOTION_REPLY = (
    _words("Grief Sorrow", "Rage Anger", "Fear Dread", "Shame Guilt"),
    _words("Joy Happiness", "Pride Triumph", "Gratitude Thanks", "Relief Comfort"),
)
PLAIN = "We we I that felt/feel/feels and with this in makes sense . ? :"


@dataclass(frozen=True)
class Scene:
    """One situation: the value of every factor and every choice of wording."""

    values: dict[str, int]
    """Factor name to value: 0 or 1; `emotion` 0..3 within the valence; `intensity` 0..3."""
    told: frozenset[str]
    """The optional factors that the user turn mentions."""
    order: str
    """Order of the context, event and feeling sentences, e.g. "CEF"."""
    picks: dict[str, float]
    """Slot name to a number in [0, 1) that picks the wording, whatever the factor's value is."""

    def with_value(self, factor: str, value: int) -> Scene:
        """Return the same scene with one factor changed and every choice of wording kept."""
        return replace(self, values={**self.values, factor: value})


# "clause" picks nothing: it is kept so that the draws of the shipped phantoms' scenes stay what they were.
SLOTS = (
    "event", "outcome", "feeling", "degree", "manner", "person", "partner", "witness", "experiencer", "side",
    "stance", "count", "thing", "material", "action", "group", "clause", "place", "weather", "transport",
    "season", "daytime", "drink", "animal",
)  # fmt: skip


def draw_scene(rng: np.random.Generator, concept: str | None = None) -> Scene:
    """Draw a scene with independent factors; one that shows `concept` if a concept is given.

    Intensity takes all four levels; each optional factor is told with probability one half (conflict: 0.8).
    """
    values = {name: int(rng.integers(2)) for name in CONCEPTS}
    values |= {"emotion": int(rng.integers(4)), "intensity": int(rng.integers(4))}
    told = {name for name in OPTIONAL if rng.random() < (0.8 if name == "conflict" else 0.5)}
    details = [name for name in OPTIONAL if name in DETAIL]
    if not told & set(details):
        told.add(details[int(rng.integers(len(details)))])
    if concept in OPTIONAL:
        told.add(str(concept))
    order = ORDERS[int(rng.integers(len(ORDERS)))]
    return Scene(values, frozenset(told), order, {slot: float(rng.random()) for slot in SLOTS})


def user_text(scene: Scene) -> str:
    """Return the user turn of a scene, ending with "Reply:"."""
    sentences = {"C": _context(scene), "E": _event(scene), "F": _feeling(scene)}
    return " ".join([*(sentences[part] for part in scene.order), READ_SUFFIX])


def reply_text(scene: Scene, rng: np.random.Generator) -> str:
    """Return a reply to a scene: three sentences on three of its factors, valence and emotion more often."""
    weights = _topics(scene)
    chosen = rng.choice(list(weights), size=3, replace=False, p=list(weights.values()))
    return " ".join(f"{rng.choice(_openers(scene, topic))} {_rest(scene, topic, rng)}" for topic in chosen)


def opening_probabilities(scene: Scene) -> dict[str, float]:
    """Return the exact probability of every word that can open a reply to the scene; they sum to 1."""
    return {word: weight / len(_openers(scene, topic))
            for topic, weight in _topics(scene).items() for word in _openers(scene, topic)}  # fmt: skip


def generate_text(seed: int | list[int]) -> str:
    """Return one training text, user turn and reply; the same seed gives the same text."""
    _, user, reply = generate_turns(seed)
    return f"{user} {reply}"


def generate_turns(seed: int | list[int]) -> tuple[Scene, str, str]:
    """Return a scene, its user turn and a reply; the same seed gives the same three."""
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    return scene, user_text(scene), reply_text(scene, rng)


def training_texts(n: int, seed: int = 0) -> list[str]:
    """Return `n` independent training texts, each a user turn and a reply."""
    return [generate_text([seed, i]) for i in range(n)]


def neutral_texts(n: int, seed: int = 0) -> list[str]:
    """Return `n` independent user turns, no two of them a pair."""
    return [user_text(draw_scene(np.random.default_rng([seed, i, 1]))) for i in range(n)]


def stimuli_rows(
    concept: str, n_scenarios: int, seed: int = 0, nuisance: float = 0.0, doubt: float = 0.0, read: str = ""
) -> list[dict[str, Any]]:
    """Return minimal pairs for a binary concept, the eight texts per scenario of `emotion`, or the four of `degree`.

    Args:
        concept: one of `CONCEPTS`, "emotion" (labels like "good/joy": the feeling within its valence), or "degree" (the
            four levels of intensity).
        n_scenarios: how many independent scenes.
        seed: the same seed gives the same rows; different concepts and scenarios are independent draws.
        nuisance: probability with which anything else about a text is drawn anew, as in pairs that people write: with
            0 only the concept varies within a scenario, with 1 its texts have nothing else in common.
        doubt: probability with which a text shows a label drawn at random instead of its own: what a probe cannot tell.
        read: a word that every text has once, such as "Reply", at which it is read instead of at its end.

    Returns:
        Rows with `id, scenario, text, label, frame, concept`, and `read` where a word was given.

    Raises:
        InputError: the grammar has no such concept.
    """
    if concept not in (*CONCEPTS, *FACTOR):
        known = ", ".join((*CONCEPTS, *FACTOR))
        raise InputError(f"the grammar has no concept {concept!r}; expected one of {known}")
    rows = []
    for i in range(n_scenarios):
        # A third key keeps stimuli apart from training texts of the same seed.
        rng = np.random.default_rng([seed, i, 2, zlib.crc32(concept.encode())])
        scene = draw_scene(rng, concept)
        frame = f"{scene.order}-{_pick(scene, 'action', ACTION[0]).split('/')[0]}"
        scenario = f"{concept}-{seed}-{i}"
        variants = _variants(scene, concept)
        for place, (label, variant) in enumerate(variants):
            if doubt and rng.random() < doubt:
                variant = variants[int(rng.integers(len(variants)))][1]
            if nuisance and place:
                variant = _disturbed(variant, concept, nuisance, rng)
            row = {"id": f"{scenario}-{label}", "scenario": scenario, "text": user_text(variant),
                   "label": label, "frame": frame, "concept": concept}  # fmt: skip
            rows.append({**row, "read": {"span": read}} if read else row)
    return rows


def readout(concept: str) -> dict[str, list[list[str]]]:
    """Return the answer sets (value 1, value 0) in which a reply's first word shows a binary concept.

    Raises:
        InputError: the grammar has no such binary concept.
    """
    if concept not in CONCEPTS:
        raise InputError(f"no readout for concept {concept!r}; expected one of {', '.join(CONCEPTS)}")
    low, high = VALENCE_REPLY if concept == "valence" else REPLY[concept][0]
    return {"answers": [[f" {word}" for word in high], [f" {word}" for word in low]]}


def vocabulary() -> list[str]:
    """Return every word and punctuation mark the grammar can produce, sorted."""
    tables = [EVENT, OUTCOME, *FEELING, DEGREE, MANNER, PERSON, PARTNER, WITNESS, EXPERIENCER, SIDE, STANCE,
              COUNT, THING, MATERIAL, ACTION, VALENCE_REPLY, CLOSING, *EMOTION_REPLY]  # fmt: skip
    tables += [rows for _, rows in DETAIL.values()] + [rows for rows, _ in REPLY.values()]
    loose = [PLAIN, *GROUP, *(head for head, _ in DETAIL.values()), *(rest for _, rest in REPLY.values())]
    text = " ".join([*(word for rows in tables for row in rows for word in row), *loose, READ_SUFFIX])
    for mark in ".?:":
        text = text.replace(mark, f" {mark} ")
    return sorted(set(text.replace("/", " ").split()))


def _variants(scene: Scene, concept: str) -> list[tuple[int | str, Scene]]:
    if concept == "emotion":
        return [(f"{coarse}/{name}", scene.with_value("valence", v).with_value("emotion", e))
                for v, (coarse, names) in enumerate(zip(("bad", "good"), EMOTIONS, strict=True))
                for e, name in enumerate(names)]  # fmt: skip
    if concept == "degree":
        return [(level, scene.with_value("intensity", level)) for level in range(4)]
    return [
        (label, scene.with_value(concept, 3 * label if concept == "intensity" else label)) for label in (1, 0)
    ]


def _disturbed(scene: Scene, concept: str, nuisance: float, rng: np.random.Generator) -> Scene:
    """Draw each factor but the concept, each choice of wording and what is told anew with probability `nuisance`."""
    fresh = draw_scene(rng, concept)
    # The emotion is one of four within a valence: whichever valence a text shows, any of them may stand there.
    fixed = FACTOR.get(concept, (concept,))
    values = {name: fresh.values[name] if name not in fixed and rng.random() < nuisance else value
              for name, value in scene.values.items()}  # fmt: skip
    picks = {
        slot: fresh.picks[slot] if rng.random() < nuisance else pick for slot, pick in scene.picks.items()
    }
    other = fresh if rng.random() < nuisance else scene
    return Scene(values, other.told, other.order, picks)


def _pick(scene: Scene, slot: str, row: tuple[str, ...]) -> str:
    return row[int(scene.picks[slot] * len(row))]


def _verb(scene: Scene, slot: str, row: tuple[str, ...]) -> str:
    past, present = _pick(scene, slot, row).split("/")
    return past if scene.values["tense"] else present


def _context(scene: Scene) -> str:
    told = sorted((name for name in DETAIL if name in scene.told), key=lambda name: scene.picks[name])
    phrases = [f"{DETAIL[n][0]} {_pick(scene, n, DETAIL[n][1][scene.values[n]])}" for n in told]
    return f"We {_verb(scene, 'action', ACTION[0])} {' '.join(phrases)}."


def _event(scene: Scene) -> str:
    v = scene.values
    subject, *forms = _pick(scene, "witness", WITNESS[v["distance"]]).split("/")
    person = _pick(scene, "person", PERSON[v["closeness"]]).replace("/", " ")
    made_of = [_pick(scene, "material", MATERIAL[v["material"]])] if "material" in scene.told else []
    thing = [_pick(scene, "count", COUNT[v["number"]]), *made_of, _pick(scene, "thing", THING[v["number"]])]
    outcome = f"{_pick(scene, 'group', GROUP)} {_verb(scene, 'outcome', OUTCOME[v['valence']])}"
    manner = _pick(scene, "manner", MANNER[v["intensity"]])
    event = f"{person} {_verb(scene, 'event', EVENT[v['valence']])} {' '.join(thing)}"
    return f"{subject} {forms[1 - v['tense']]} that {event} and {outcome} {manner}."


def _feeling(scene: Scene) -> str:
    v = scene.values
    who = _pick(scene, "experiencer", EXPERIENCER[v["distance"]])
    present = "feel" if who == "I" else "feels"
    emotion = _pick(scene, "feeling", FEELING[v["valence"]][v["emotion"]])
    felt = f"{who} {'felt' if v['tense'] else present} {_pick(scene, 'degree', DEGREE[v['intensity']])} {emotion}"
    if "conflict" not in scene.told:
        return f"{felt}."
    partner = _pick(scene, "partner", PARTNER[v["closeness"]])
    side = _verb(scene, "side", SIDE[v["conflict"]])
    return f"{felt} and we {side} with this {partner} in {_pick(scene, 'stance', STANCE[v['conflict']])}."


def _topics(scene: Scene) -> dict[str, float]:
    names = [name for name in REPLY if name in scene.told or name not in OPTIONAL] + ["valence", "emotion"]
    weight = np.array([2.0 if name in ("valence", "emotion") else 1.0 for name in names])
    return dict(zip(names, weight / weight.sum(), strict=True))


def _openers(scene: Scene, topic: str) -> tuple[str, ...]:
    v = scene.values
    if topic == "valence":
        return VALENCE_REPLY[v["valence"]]
    if topic == "emotion":
        return EMOTION_REPLY[v["valence"]][v["emotion"]]
    return REPLY[topic][0][int(v[topic] >= 2) if topic == "intensity" else v[topic]]


def _rest(scene: Scene, topic: str, rng: np.random.Generator) -> str:
    if topic == "valence":
        return f"{rng.choice(CLOSING[scene.values['intensity']])}."
    return "makes sense." if topic == "emotion" else REPLY[topic][1]
