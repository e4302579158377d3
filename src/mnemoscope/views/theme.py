"""The colours of all pages and pictures, light and dark.

A chart is specified in the light colours, so that its file is right on white paper; `plots.svg` puts the page's
variables in their place, so that the same picture follows the page into the dark.
"""

from __future__ import annotations

# What charts use: name of the variable, light, dark. No light colour is there twice.
CHARTS = {
    "panel": ("#ffffff", "#1a1b1e"),
    "ink": ("#1d1c1a", "#e7e5e0"),
    "dim": ("#68655f", "#a5a29a"),
    "line": ("#e3e1db", "#303236"),
    "chance": ("#b9b5ac", "#5a5852"),
    "blue": ("#1f64ad", "#7db4ec"),
    "orange": ("#b4520a", "#f0a561"),
    "teal": ("#2f6f6a", "#6cc4ba"),
    "violet": ("#8557a8", "#be97e0"),
}
COLOURS = CHARTS | {
    "paper": ("#fdfdfc", "#131416"),
    "wash": ("#f3f2ee", "#25272b"),
    "shadow": ("#00000030", "#000000d0"),
    "blue-wash": ("#1f64ad", "#5698de"),
    "orange-wash": ("#d86a14", "#e2842e"),
}


def light(name: str) -> str:
    """A colour as it is on white paper."""
    return COLOURS[name][0]
