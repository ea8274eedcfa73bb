"""What a run of classes or numbers learned beside its weights, and its metrics for each class."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from siliang.config.data import MOST_LABELS
from siliang.records.saved import Count, Name, Part, Rate, Sentence, Share

MOST_CLASSES = 1000  # of a report
LONGEST_NAME = 200  # characters
MOST_IN_TABLE = 50  # of a confusion matrix
ERRORS = 10


class Classification(Part):
    """How labels were read, and what was chosen for predictions at the end of the training."""

    problem: Literal["one_label", "several_labels", "number", "ordered"]
    """What a label is."""
    why: Sentence = ""
    """Why they were taken for that; empty where the settings say it."""
    class_weights: Annotated[list[Rate], Field(max_length=MOST_LABELS)] | None = None
    """The weight of each class in the loss, by number."""
    chosen_on: Literal["validation", "held_out"] | None = None
    """The rows on which the temperature and the thresholds were chosen: those of data.validation_size, or the held-out
    rows. The metrics and the answers in the records are of the same rows, and so are those without them. None: nothing
    was chosen."""
    temperature: Annotated[float, Field(gt=0, le=1000)] | None = None
    """What logits are divided by in predictions (Guo et al. 2017); None: 1."""
    ece_before: Share | None = None
    """The expected calibration error on these rows before the temperature, with 15 bins."""
    ece_after: Share | None = None
    """The same after it."""
    thresholds: Annotated[list[Share], Field(max_length=MOST_LABELS)] | None = None
    """The probability from which each label is given, by number."""

    def before_choice(self) -> Classification:
        """The same without what was chosen at the end of the training."""
        return self.model_copy(update={"temperature": None, "thresholds": None})


class ClassMetrics(Part):
    """A class of the held-out rows."""

    name: Name
    rows: Count
    """With this class."""
    predicted: Count
    """To which the model gives it."""
    precision: Share
    recall: Share
    f1: Share


class Mistake(Part):
    """A wrong prediction."""

    where: str = ""
    text: str
    expected: str
    predicted: str
    probability: Share | None = None
    """Of the prediction; None for a number."""


class ClassReport(Part):
    """The held-out rows by class, and the mistakes of which the model is most confident."""

    classes: Annotated[list[ClassMetrics], Field(max_length=MOST_CLASSES)] = Field(default_factory=list)
    """In the order of their numbers; of more than 1,000, those with the most held-out rows."""
    confusion: Annotated[list[list[Count]], Field(max_length=MOST_IN_TABLE)] | None = None
    """Rows by (right class, predicted class), in the order of `classes`; None for several labels, numbers, or more than
    50 classes."""
    mistakes: Annotated[list[Mistake], Field(max_length=ERRORS)] = Field(default_factory=list)
    """The most confident first; of numbers, the largest differences."""
