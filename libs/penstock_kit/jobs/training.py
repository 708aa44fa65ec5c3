"""The names that a training recipe may use, with their parameters: one table each.

The worker builds by these tables, the command line lists them, and the scheduler refuses what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock_kit.jobs.fields import Field

TASKS = ("tabular", "image", "text", "language_model")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model is built of.

    Attributes:
        tasks: What it may learn; the first that has it is the one it is made for.
        help: What it is, for people.
        parameters: Its sizes.
    """

    tasks: tuple[str, ...]
    help: str
    parameters: Mapping[str, Field] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimizerEntry:
    """An optimizer.

    Attributes:
        cls: Its class in torch.optim.
        learning_rate: The usual one.
        help: What it does, for people.
        parameters: Those that torch's class takes; None as a default means torch's own.
        full_batch: It takes all rows in each step, so one step is an epoch.
        closure: It computes the loss several times in a step.
    """

    cls: str
    learning_rate: float
    help: str
    parameters: Mapping[str, Field]
    full_batch: bool = False
    closure: bool = False


def _size(default: int, text: str, low: int = 1, high: int = 65536) -> Field:
    return Field("integer", default, text, low=low, high=high)


def _number(default: float | None, text: str, high: float = 1e6) -> Field:
    return Field("number", default, text, low=0.0, high=high)


_DROPOUT = Field(
    "number", 0.0, "Part of the values that are dropped while training.", low=0.0, high=1.0, below_high=True
)
_HIDDEN = Field("integers", (64, 64), "Width of each hidden layer.", low=1, high=65536, length=(0, 32))
_TEXT = {
    "tokenizer": Field(
        "choice", "bpe", "How texts become tokens: trained pieces, or bytes.", choices=("bpe", "bytes")
    ),
    "vocabulary": _size(4096, "Pieces at most (bpe).", low=300, high=200_000),
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "mlp": Architecture(
        ("tabular", "image"),
        "Fully connected layers.",
        {
            "hidden": _HIDDEN,
            "activation": Field(
                "choice", "relu", "Behind each hidden layer.", choices=("relu", "gelu", "tanh", "silu")
            ),
            "dropout": _DROPOUT,
        },
    ),
    "linear": Architecture(("tabular", "image"), "One layer: linear or logistic regression."),
    "cnn": Architecture(
        ("image",),
        "Convolutions, halved in size after each width.",
        {
            "channels": Field(
                "integers", (32, 64), "Channels of each stage.", low=1, high=4096, length=(1, 8)
            ),
            "hidden": _size(128, "Width of the layer before the last; 0 for none.", low=0),
            "dropout": _DROPOUT,
        },
    ),
    "resnet": Architecture(
        ("image",),
        "Residual blocks of convolutions with group normalization.",
        {
            "channels": Field(
                "integers", (32, 64), "Channels of each stage.", low=8, high=4096, length=(1, 6)
            ),
            "blocks": _size(1, "Residual blocks of each stage.", high=64),
        },
    ),
    "vit": Architecture(
        ("image",),
        "Vision transformer: patches as tokens.",
        {
            "patch": _size(0, "Side of a patch in pixels; 0 for an eighth of the image, 2 at least.", low=0),
            "width": _size(64, "Width of a token; a multiple of heads."),
            "layers": _size(4, "Blocks.", high=256),
            "heads": _size(4, "Heads of attention.", high=256),
            "dropout": _DROPOUT,
        },
    ),
    "transformer": Architecture(
        ("text",),
        "Transformer encoder, the mean of its tokens classified.",
        {
            "width": _size(128, "Width of a token; a multiple of heads."),
            "layers": _size(2, "Blocks.", high=256),
            "heads": _size(4, "Heads of attention.", high=256),
            "length": _size(128, "Tokens of a text at most; what is beyond is cut off.", high=8192),
            "dropout": _DROPOUT,
            **_TEXT,
        },
    ),
    "bag": Architecture(
        ("text",),
        "Mean of embeddings, classified by a small network.",
        {
            "width": _size(64, "Width of an embedding."),
            "hidden": _size(0, "Width of the layer before the last; 0 for none.", low=0),
            "length": _size(256, "Tokens of a text at most; what is beyond is cut off.", high=8192),
            "dropout": _DROPOUT,
            **_TEXT,
        },
    ),
    "gpt": Architecture(
        ("language_model",),
        "Transformer decoder that predicts the next token.",
        {
            "width": _size(128, "Width of a token; a multiple of heads."),
            "layers": _size(4, "Blocks.", high=256),
            "heads": _size(4, "Heads of attention.", high=256),
            "length": _size(128, "Tokens that it sees at once.", low=2, high=8192),
            "dropout": _DROPOUT,
            **_TEXT,
            "vocabulary": _size(2048, "Pieces at most (bpe).", low=300, high=200_000),
        },
    ),
}
"""By name. The first of a task's is not the usual one: see USUAL_ARCHITECTURE."""

USUAL_ARCHITECTURE: Mapping[str, str] = {
    "tabular": "mlp",
    "image": "cnn",
    "text": "transformer",
    "language_model": "gpt",
}

_DECAY = _number(None, "Weight decay.")
_BETAS = Field("numbers", None, "Decay of both means.", low=0.0, high=1.0, below_high=True, length=(2, 2))
_EPS = _number(None, "Added to the denominator.")


def _adam_like(*more: str) -> dict[str, Field]:
    found = {"betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY}
    for name in more:
        found[name] = Field("flag", None, "As torch describes it.")
    return found


OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "gd": OptimizerEntry(
        "SGD",
        0.1,
        "Gradient descent over all rows: one step an epoch.",
        {"weight_decay": _number(0.0, "Weight decay (L2).")},
        full_batch=True,
    ),
    "sgd": OptimizerEntry(
        "SGD",
        0.01,
        "Stochastic gradient descent.",
        {
            "momentum": _number(0.0, "Part of the last direction that is kept.", high=1.0),
            "dampening": _number(0.0, "Part of the gradient that momentum leaves out.", high=1.0),
            "weight_decay": _number(0.0, "Weight decay (L2)."),
            "nesterov": Field("flag", False, "Look ahead; needs momentum and no dampening."),
        },
    ),
    "adam": OptimizerEntry("Adam", 0.001, "Adam (Kingma & Ba 2015).", _adam_like("amsgrad")),
    "adamw": OptimizerEntry(
        "AdamW", 0.001, "Adam with decoupled weight decay (Loshchilov & Hutter 2019).", _adam_like("amsgrad")
    ),
    "adadelta": OptimizerEntry(
        "Adadelta",
        1.0,
        "As torch.optim has it.",
        {"rho": _number(None, "Decay of the mean.", high=1.0), "eps": _EPS, "weight_decay": _DECAY},
    ),
    "adafactor": OptimizerEntry(
        "Adafactor",
        0.01,
        "As torch.optim has it.",
        {
            "beta2_decay": Field("number", None, "Decay of the mean of squares.", high=0.0),
            "d": _number(None, "Clipping threshold of an update."),
            "weight_decay": _DECAY,
        },
    ),
    "adagrad": OptimizerEntry(
        "Adagrad",
        0.01,
        "As torch.optim has it.",
        {
            "lr_decay": _number(None, "Decay of the learning rate."),
            "weight_decay": _DECAY,
            "initial_accumulator_value": _number(None, "Sum of squares to begin with."),
            "eps": _EPS,
        },
    ),
    "adamax": OptimizerEntry("Adamax", 0.002, "As torch.optim has it.", _adam_like()),
    "asgd": OptimizerEntry(
        "ASGD",
        0.01,
        "Averaged stochastic gradient descent, as torch.optim has it.",
        {
            "lambd": _number(None, "Decay term."),
            "alpha": _number(None, "Power of the learning rate's decay."),
            "t0": _number(None, "Step at which averaging begins.", high=1e12),
            "weight_decay": _DECAY,
        },
    ),
    "lbfgs": OptimizerEntry(
        "LBFGS",
        1.0,
        "Quasi-Newton over all rows: one step an epoch, several passes a step.",
        {
            "max_iter": _size(20, "Passes of a step at most.", high=1000),
            "history_size": _size(100, "Updates that it remembers.", high=1000),
            "tolerance_grad": _number(None, "Ends a step below this gradient."),
            "tolerance_change": _number(None, "Ends a step below this change."),
            "line_search_fn": Field("choice", None, "How far a step goes.", choices=("strong_wolfe",)),
        },
        full_batch=True,
        closure=True,
    ),
    "nadam": OptimizerEntry(
        "NAdam",
        0.002,
        "As torch.optim has it.",
        {**_adam_like("decoupled_weight_decay"), "momentum_decay": _number(None, "Decay of momentum.")},
    ),
    "radam": OptimizerEntry("RAdam", 0.001, "As torch.optim has it.", _adam_like("decoupled_weight_decay")),
    "rmsprop": OptimizerEntry(
        "RMSprop",
        0.01,
        "As torch.optim has it.",
        {
            "alpha": _number(None, "Decay of the mean of squares.", high=1.0),
            "eps": _EPS,
            "weight_decay": _DECAY,
            "momentum": _number(None, "Part of the last direction that is kept.", high=1.0),
            "centered": Field("flag", None, "Divide by the variance instead."),
        },
    ),
    "rprop": OptimizerEntry(
        "Rprop",
        0.01,
        "By the gradient's sign alone, over all rows: one step an epoch.",
        {
            "etas": Field("numbers", None, "Factors of a smaller and a larger step.", low=0.0, length=(2, 2)),
            "step_sizes": Field("numbers", None, "Least and largest step.", low=0.0, length=(2, 2)),
        },
        full_batch=True,
    ),
}
"""By name, as torch.optim has them in lower case, and gd."""

REFUSED_OPTIMIZERS: Mapping[str, str] = {
    "sparseadam": "it takes sparse gradients only, which no recipe's model has; adam is the nearest",
    "muon": "it takes matrices only, and models have biases and norms as well; adamw is the nearest",
}

SCHEDULES: Mapping[str, Mapping[str, Field]] = {
    "constant": {},
    "cosine": {"final": _number(0.0, "Learning rate at the end, as a part of the first.", high=1.0)},
    "linear": {"final": _number(0.0, "Learning rate at the end, as a part of the first.", high=1.0)},
    "step": {
        "step_size": _size(10, "Epochs between two drops.", high=1_000_000),
        "gamma": _number(0.1, "Factor of a drop.", high=1.0),
    },
    "exponential": {"gamma": _number(0.95, "Factor of each epoch.", high=1.0)},
    "one_cycle": {
        "rise": Field(
            "number",
            0.3,
            "Part of the steps in which it rises.",
            low=0.0,
            high=1.0,
            above_low=True,
            below_high=True,
        ),
        "start": Field("number", 25.0, "It begins at the learning rate divided by this.", low=1.0, high=1e6),
        "end": Field("number", 1e4, "It ends at its begin divided by this.", low=1.0, high=1e9),
    },
    "plateau": {
        "factor": _number(0.1, "Factor of a drop.", high=1.0),
        "patience": _size(5, "Epochs without a gain before a drop.", low=0, high=1_000_000),
        "min_delta": _number(1e-4, "A smaller gain, as a part of the best, is none."),
    },
}
"""By name; `epochs` of step, exponential and plateau are those of the training."""

LOSSES: Mapping[str, str] = {
    "cross_entropy": "classes",
    "mse": "numbers",
    "mae": "numbers",
    "huber": "numbers",
}
"""Name → what its targets are."""

STRATEGIES = ("single", "ddp", "fsdp", "pipeline", "tensor_parallel", "parameter_server")

METRICS: Mapping[str, bool] = {
    "train/loss": False,
    "held_out/loss": False,
    "held_out/accuracy": True,
    "held_out/f1": True,
    "held_out/mse": False,
    "held_out/mae": False,
    "held_out/r2": True,
    "held_out/perplexity": False,
}
"""Metrics of an epoch → whether more is better."""
