"""What a photo shows, in CelebA's attribute names and in an English sentence, read off the parameters."""

from __future__ import annotations

import numpy as np

from pyface.data.procedural.parameters import (
    HAIR_COLOURS,
    Person,
    View,
    beard_amount,
    effective_age,
    grey_share,
    makeup_amount,
    stream,
)

_CAPTIONS = 4


def attributes(person: Person, view: View) -> dict[str, bool]:
    """CelebA-style attributes of one photo, by name. Everything is a threshold on what is drawn."""
    hair, age = person.hair, effective_age(person, view)
    covered = view.hat != "none"
    bald = hair.style == "bald"
    shown = not bald and not (covered and hair.style in ("buzz", "short", "parted"))
    grey = grey_share(person, view) > 0.5
    colour = None if not shown else "grey" if grey else hair_colour(person)
    beard, style = beard_amount(person, view), person.beard.style
    grown = beard > 0.05
    makeup = makeup_amount(person, view)
    wavy = hair.curl > 0.4
    return {
        "Arched_Eyebrows": person.brows.arch > 0.45,
        "Bags_Under_Eyes": age > 55,
        "Bald": bald and not covered,
        "Bangs": has_bangs(person, view),
        "Big_Lips": person.lips.upper + person.lips.lower > 0.8,
        "Big_Nose": person.nose.width + 0.6 * person.nose.depth > 0.6,
        "Black_Hair": colour == "black",
        "Blond_Hair": colour == "blond",
        "Brown_Hair": colour in ("brown", "light brown", "red"),
        "Bushy_Eyebrows": person.brows.thickness > 0.6,
        "Chubby": person.shape.fullness > 0.8,
        "Eyeglasses": view.glasses != "none",
        "Goatee": grown and style == "goatee",
        "Gray_Hair": colour == "grey",
        "Heavy_Makeup": makeup > 0.6,
        "High_Cheekbones": person.shape.cheekbones > 0.5,
        "Male": person.female <= 0.5,
        "Mouth_Slightly_Open": view.mouth_open > 0.15,
        "Mustache": grown and style in ("moustache", "goatee", "full"),
        "No_Beard": not grown,
        "Pale_Skin": person.skin.tone < 0.1,
        "Receding_Hairline": shown and not covered and hair.recession > 0.6,
        "Rosy_Cheeks": makeup > 0.7 or person.skin.blush > 0.9,
        "Smiling": view.smile > 0.35,
        "Straight_Hair": shown and not wavy,
        "Wavy_Hair": shown and wavy,
        "Wearing_Earrings": has_earrings(person, view),
        "Wearing_Hat": covered,
        "Wearing_Lipstick": makeup > 0.3,
        "Young": age < 45,
    }


def has_bangs(person: Person, view: View) -> bool:
    """Whether hair falls over the forehead: it needs some length, and a hat hides it."""
    return view.bangs and person.hair.style in ("short", "parted", "bob", "long", "tied") and view.hat == "none"


def shows_ears(person: Person) -> bool:
    """Whether the hairstyle leaves the ears free."""
    return person.hair.style not in ("bob", "long") and not (person.hair.style == "afro" and person.hair.volume > 0.2)


def has_earrings(person: Person, view: View) -> bool:
    """Whether ear-rings are seen; men wear none here."""
    return view.earrings and person.female > 0.5 and shows_ears(person)


def hair_colour(person: Person) -> str:
    """The name in :data:`HAIR_COLOURS` nearest to the person's natural colour."""
    names = list(HAIR_COLOURS)
    colours = np.log(np.array([HAIR_COLOURS[name][0] for name in names]) + 0.02)
    return names[int(np.argmin(((colours - np.log(np.array(person.hair.colour) + 0.02)) ** 2).sum(1)))]


def caption(person: Person, view: View) -> str:
    """One English sentence about the photo. The wording varies with the person and the view, not with chance."""
    rng = stream(_CAPTIONS, person.seed, view.camera.seed)
    shown = attributes(person, view)
    sentence = f"{_who(person, view, rng)}{_extras(person, view, shown, rng)}"
    acts = _acts(view, shown)
    if acts:
        sentence += f", {acts[0]}" if len(acts) == 1 else f", {acts[0]} and {acts[1]}"
    if rng.random() < 0.5:
        sentence += {
            "plain": ", in front of a plain background",
            "gradient": ", in a studio",
            "bokeh": ", with blurred lights behind",
            "leaves": ", outdoors",
            "indoor": ", indoors",
        }[view.background.kind]
    start = ("", "a photo of ", "a portrait of ", "a close-up of ")[rng.integers(4)]
    sentence = start + sentence
    return sentence[0].upper() + sentence[1:] + "."


def _who(person: Person, view: View, rng: np.random.Generator) -> str:
    age, man = effective_age(person, view), person.female <= 0.5
    if age < 13:
        noun, words = ("boy" if man else "girl"), ("a young", "a")
    elif age < 20:
        noun, words = ("young man" if man else "young woman"), ("a",)
    elif age < 35:
        noun, words = ("man" if man else "woman"), ("a young", "a")
    elif age < 60:
        noun, words = ("man" if man else "woman"), ("a middle-aged", "a")
    else:
        noun, words = ("man" if man else "woman"), ("an old", "an elderly", "an older")
    return f"{words[rng.integers(len(words))]} {noun}"


def _extras(person: Person, view: View, shown: dict[str, bool], rng: np.random.Generator) -> str:
    features = []
    if shown["Bald"]:
        features.append("a bald head")
    elif shown["Straight_Hair"] or shown["Wavy_Hair"]:
        colour, wavy = "grey" if shown["Gray_Hair"] else hair_colour(person), shown["Wavy_Hair"]
        length = {"buzz": "very short", "short": "short", "long": "long", "bob": "chin-length", "afro": "afro"}
        words = [length.get(person.hair.style, ""), "" if person.hair.style in ("buzz", "afro") else
                 "curly" if person.hair.curl > 0.7 else "wavy" if wavy else "straight", colour]  # fmt: skip
        features.append(" ".join(word for word in words if word) + " hair")
    if shown["Bangs"]:
        features.append("bangs")
    if not shown["No_Beard"]:
        features.append({"full": "a beard", "stubble": "stubble", "goatee": "a goatee", "moustache": "a moustache"}[
            person.beard.style])  # fmt: skip
    if person.skin.freckles > 0.3:
        features.append("freckles")
    features = features[: 2 + int(rng.integers(2))]
    worn = []
    if shown["Eyeglasses"]:
        worn.append("sunglasses" if view.glasses == "sunglasses" else "glasses")
    if shown["Wearing_Hat"]:
        worn.append(f"a {view.hat}")
    if shown["Wearing_Earrings"]:
        worn.append("earrings")
    if shown["Wearing_Lipstick"] and rng.random() < 0.5:
        worn.append("lipstick")
    text = f" with {_listed(features)}" if features else ""
    return text + (f" wearing {_listed(worn)}" if worn else "")


def _acts(view: View, shown: dict[str, bool]) -> list[str]:
    acts = []
    if shown["Smiling"]:
        acts.append("laughing" if view.mouth_open > 0.35 else "smiling")
    if view.eye_open < 0.25:
        acts.append("with closed eyes")
    elif view.pose[1] > 0.35:
        acts.append("turned to the left")
    elif view.pose[1] < -0.35:
        acts.append("turned to the right")
    elif abs(view.gaze[0]) < 0.12 and abs(view.gaze[1]) < 0.12 and view.glasses != "sunglasses":
        acts.append("looking into the camera")
    if view.occluder is not None:
        acts.append({"hand": "a hand in front of the face", "mask": "the mouth covered by a mask",
                     "paper": "a sheet of paper in front of the face",
                     "microphone": "speaking into a microphone"}[view.occluder])  # fmt: skip
    return acts[:2]


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
