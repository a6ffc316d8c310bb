"""Which initialization of FLoRA trains best on convolutions: ours and the three of its authors, beside LoRA.

    python examples/benchmarks/flora_inits.py                 digits, about half an hour on 2 cores
    python examples/benchmarks/flora_inits.py --data FOLDER --tasks cifar10 resnet-cifar10

All have their defaults otherwise, so that rank and scaling are what an untuned user has. Rows, steps and
early stopping are those of `quality.py`; heads train with the rate that is best for the head alone. The
question: how does each do at LoRA's best rate, and how wide is the range of rates that it takes?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft

import learning_rates
from peft_subspace import FLoRAConfig


class Initializations(learning_rates.Rates):
    """Runs of LoRA and of FLoRA with each of its initializations."""

    configs: Mapping[str, Callable[..., Any]] = {
        "LoRA": peft.LoraConfig,
        **{f"FLoRA, {start}": partial(FLoRAConfig, init_weights=start) for start in FLoRAConfig.init_choices},
    }


if __name__ == "__main__":
    options = learning_rates.parse_arguments(description=__doc__, results="flora_inits")
    options.small, options.longer = False, 1
    learning_rates.run(Initializations, options)
