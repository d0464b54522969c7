"""A model card: README.md in the hub's format."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What the card of a family says beside the facts of a run."""

    title: str
    licence: str         # `license` of the hub's metadata; "": not known
    ending: str          # the licence of the weights in words, with its line's end
    opens: str           # what opens the folder, beside predictor.py
    library: str = "diffusers"


def model_card(card, lines, facts):
    """Text of a card.

    lines  of the network: targets, colour space, ...;  facts  of the run: base, trained_on, command, commit, ...
    """
    licence = f"license: {card.licence}\n" if card.licence else ""
    base = f"base_model: {facts['base']}\n" if facts.get("base") else ""
    both = lines | {k.replace("_", " "): v for k, v in facts.items() if v}
    return (f"---\n{licence}library_name: {card.library}\n{base}---\n"
            f"# {card.title}, fine-tuned by ReasonX GRPO\n\n- opens with {card.opens}\n"
            + "".join(f"- {k}: {v}\n" for k, v in both.items()) + card.ending)
