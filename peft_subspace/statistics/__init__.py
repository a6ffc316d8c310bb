"""What data does in a model's layers: second moments of inputs and gradients, gathered in one pass."""

from .collection import collect
from .moment import SecondMoment
from .record import Statistics, grams

load = Statistics.load

__all__ = ["SecondMoment", "Statistics", "collect", "grams", "load"]
