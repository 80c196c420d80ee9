"""How Chinese a text is."""

import re

HAN = re.compile("[\u4e00-\u9fff]+")
SPACE = re.compile(r"\s+")


def han_share(text: str) -> float:
    """The share of Han characters among those that are not space."""
    solid = SPACE.sub("", text)
    return 1 - len(HAN.sub("", solid)) / len(solid) if solid else 0.0
