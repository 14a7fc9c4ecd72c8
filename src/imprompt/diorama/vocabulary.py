"""What the diorama world is made of: the words that captions use and the colours behind them.

Every list is ordered; its index is the class number that segmentation maps and the judge use.
Colours are sRGB triples in [0, 1].
"""

OBJECT_KINDS = (
    "house",
    "tree",
    "mushroom",
    "rocket",
    "snowman",
    "car",
    "boat",
    "cactus",
    "mug",
    "castle",
    "duck",
    "chair",
)
PERSON = "person"
KINDS = (*OBJECT_KINDS, PERSON)

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.53, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.20, 0.68, 0.22),
    "teal": (0.10, 0.72, 0.72),
    "blue": (0.16, 0.33, 0.90),
    "purple": (0.52, 0.20, 0.78),
    "pink": (1.00, 0.50, 0.74),
}

STYLES = ("clay", "cartoon", "line art", "neon", "watercolor", "crayon")

SETTINGS = ("meadow", "desert", "snow", "night", "studio")

PLACEMENTS = ("left", "center", "right")
SIZES = ("small", "large")
CAMERAS = ("low", "high")

# Part numbers of the segmentation map. Sky and ground come first; MAIN carries the scene's colour.
PARTS = (
    "sky",
    "ground",
    "main",
    "cream",
    "dark",
    "wood",
    "grey",
    "skin",
    "hair",
    "eye",
    "lip",
)
SKY, GROUND, MAIN, CREAM, DARK, WOOD, GREY, SKIN, HAIR, EYE, LIP = range(len(PARTS))

FIXED_PART_COLOURS: dict[int, tuple[float, float, float]] = {
    CREAM: (0.97, 0.93, 0.84),
    DARK: (0.20, 0.19, 0.23),
    WOOD: (0.50, 0.35, 0.24),
    GREY: (0.62, 0.62, 0.66),
    LIP: (0.72, 0.34, 0.33),
}

# (sky at the top, sky at the horizon, ground near the camera, ground at the horizon)
SETTING_COLOURS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "meadow": ((0.45, 0.68, 0.95), (0.86, 0.93, 0.99), (0.46, 0.66, 0.32), (0.62, 0.78, 0.48)),
    "desert": ((0.62, 0.76, 0.88), (0.99, 0.91, 0.78), (0.88, 0.74, 0.52), (0.95, 0.85, 0.67)),
    "snow": ((0.66, 0.74, 0.84), (0.88, 0.91, 0.95), (0.90, 0.93, 0.97), (0.97, 0.98, 0.99)),
    "night": ((0.05, 0.06, 0.18), (0.16, 0.17, 0.36), (0.13, 0.15, 0.26), (0.19, 0.20, 0.36)),
    "studio": ((0.74, 0.72, 0.72), (0.82, 0.80, 0.79), (0.71, 0.68, 0.66), (0.82, 0.80, 0.79)),
}

FACE_SHAPES = ("round", "long", "square")
SKIN_TONES: dict[str, tuple[float, float, float]] = {
    "pale": (0.97, 0.84, 0.74),
    "tan": (0.84, 0.63, 0.46),
    "brown": (0.58, 0.39, 0.27),
    "dark": (0.36, 0.24, 0.18),
}
HAIR_SHAPES = ("short", "long", "curly", "bun", "spiky", "bald")
HAIR_COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.10, 0.09, 0.10),
    "brown": (0.36, 0.22, 0.13),
    "blond": (0.90, 0.76, 0.42),
    "ginger": (0.78, 0.36, 0.12),
    "white": (0.92, 0.92, 0.92),
}
EYE_COLOURS: dict[str, tuple[float, float, float]] = {
    "dark": (0.12, 0.08, 0.07),
    "blue": (0.18, 0.38, 0.75),
    "green": (0.16, 0.48, 0.26),
}
GLASSES = ("no", "round", "square")
NOSES = ("small", "big")
BEARDS = ("no", "full")
