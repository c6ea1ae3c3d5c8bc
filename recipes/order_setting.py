"""What decides the numbers of `recipes.order`: its arms, what is asked of which images, sizes and steps."""

from dataclasses import dataclass

from addenda import AddendaError

ADAPTERS = ("dual", "regression", "pairwise", "ranknet", "blind", "shuffled")
RIDGES = ("pixels", "patches", "image × text")
TUNED = ("whole", "lora")
ALIGNMENT = "alignment"
ARMS = (*ADAPTERS, *RIDGES, *TUNED, ALIGNMENT)
OTHER = "other text"  # the dual head's scores by another class's sentence, against this one's counts
SUBJECTS = ("mosaics", "grades", "textile")

ASKED = (  # in the order of `addenda.data.idx.CLOTHES`
    "how many T-shirts are there", "how many trousers are there", "how many pullovers are there",
    "how many dresses are there", "how many coats are there", "how many sandals are there",
    "how many shirts are there", "how many sneakers are there", "how many bags are there",
    "how many ankle boots are there",
)  # fmt: skip
COMPOSITES = {"how many shoes are there": (5, 7, 9), "how many tops are there": (0, 2, 6)}  # classes, by number
PARAPHRASES = (
    "the number of tees", "count the pants", "the number of sweaters", "count the gowns", "the number of overcoats",
    "count the open summer shoes", "the number of button-up blouses", "count the trainers",
    "the number of handbags and purses", "count the boots that end above the ankle",
)  # fmt: skip
GERMAN = (
    "wie viele T-Shirts gibt es", "wie viele Hosen gibt es", "wie viele Pullover gibt es", "wie viele Kleider gibt es",
    "wie viele Mäntel gibt es", "wie viele Sandalen gibt es", "wie viele Hemden gibt es",
    "wie viele Turnschuhe gibt es", "wie viele Taschen gibt es", "wie viele Stiefeletten gibt es",
)  # fmt: skip
NAMES = ("a T-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
         "an ankle boot")  # fmt: skip
NOTHING = "an empty place"  # the alignment's eleventh name
BLIND = "put these images in order"  # all that the query-blind score is told
GRADED = {7: "sneakers", 8: "bags"}  # the classes whose tiles are made worse
WORSE = ("blurred", "noisy", "dark")
TEXTILE = {"global": "how uneven is the weave of the whole cloth", "local": "how large is the flaw in one place"}

QUERIES: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {  # {subject: {group: {sentence: classes that count}}}
    "mosaics": {
        "classes": {text: (k,) for k, text in enumerate(ASKED)},
        "composites": COMPOSITES,
        "paraphrases": {text: (k,) for k, text in enumerate(PARAPHRASES)},
        "german": {text: (k,) for k, text in enumerate(GERMAN)},
    },
    "grades": {"grades": {f"how {w} are the {name}": (k,) for k, name in GRADED.items() for w in WORSE}},
    "textile": {"textile": {text: () for text in TEXTILE.values()}},
}
LEARNED = {"mosaics": "classes", "grades": "grades", "textile": "textile"}  # the group that is trained on
GROUPS = tuple(group for of in QUERIES.values() for group in of)


@dataclass(frozen=True)
class Setting:
    """What decides a record's numbers.

    image, text: encoders, embedded or a folder. side: of an image, in pixels; grid: its patches are pooled to so many
    by so many, which is one for each tile. images: that are rated for every query of the mosaics; few: of the other
    two subjects. width to rate: of the adapter; chosen on validation images, with one training set of a seed that is
    none of these, by the classes alone; regression_rate: the same for the regression head alone. steps: of the
    adapter, by `images`; tuned_steps: of the fine-tuned encoder. test, validation: images that are judged
    by, and that ridges choose their penalty on. draws: of the bootstrap over test images. names: tiles with a class
    name that there are for the alignment, of which it is given as many as images are rated.
    """

    image: str = "dinov2-small"
    text: str = "e5"
    side: int = 126
    grid: int = 3
    images: tuple[int, ...] = (20, 100, 500)
    few: int = 100
    test: int = 400
    validation: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    width: int = 128
    layers: int = 2
    after: int = 0
    prompts: int = 4
    heads: int = 8
    batch: int = 32
    rate: float = 3e-4
    regression_rate: float = 1e-4
    steps: tuple[int, ...] = (300, 800, 2000)
    tuned_batch: int = 16
    tuned_steps: tuple[int, ...] = (16, 48, 128)
    whole_rate: float = 3e-5
    lora: str = "lora:rank=8"
    lora_rate: float = 5e-4
    head_rate: float = 1e-3
    names: int = 500
    draws: int = 400

    def __post_init__(self):
        for name in ("few", "test", "validation", "batch", "tuned_batch", "names", "draws"):
            if getattr(self, name) < 1:
                raise AddendaError(f"{name} is {getattr(self, name)}, and at least 1 is wanted.")
        if not self.images or not len(self.images) == len(self.steps) == len(self.tuned_steps):
            raise AddendaError("images, steps and tuned_steps are of the same sizes: give as many of each.")
        if self.few not in self.images or self.names < max(self.images):
            raise AddendaError(f"few is one of {self.images}, and names are {max(self.images)} at least.")

    def of(self, by_size: tuple[int, ...], images: int) -> int:
        """Return what a number by size is for so many images."""
        return by_size[self.images.index(images)]

    def most(self, subject: str) -> int:
        """Return the images that a seed has of a subject, of which smaller sizes take the first."""
        return max(self.images) if subject == "mosaics" else self.few


def slug(text: str) -> str:
    """Return a name without spaces, for a file."""
    return text.replace(" × ", "-").replace(" ", "-")


def run_name(subject: str, arm: str, images: int, seed: int) -> str:
    """Return the name of a run on record."""
    return f"{subject}-{slug(arm)}-{images}-{seed}"
