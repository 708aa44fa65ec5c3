"""Each optimizer follows its formula, in float64, on softmax regression of the wines.

The formulas are written out here with NumPy, gradients included; only the problem is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_wine

from penstock.scheduler.v1 import job_work_pb2
from penstock_kit.jobs.train import plan_of
from penstock_kit.jobs.training import OPTIMIZERS
from penstock_worker.adapters.training.optimizers import optimizer_maker

Vector = NDArray[np.float64]
# Gives the weights after each step, from the first weights, the gradient there and the learning rate.
Update = Callable[[Vector, Vector, int, dict[str, Any]], Vector]

STEPS = 25


def _problem() -> tuple[Vector, NDArray[np.int64]]:
    x, y = load_wine(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    return np.hstack([x, np.ones((len(x), 1))]), y


X, Y = _problem()
SHAPE = (3, X.shape[1])


def _gradient(w: Vector) -> Vector:
    """d/dW of the mean of −log softmax(XWᵀ)[y]: (P − onehot)ᵀX / n."""
    logits = X @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(Y)), Y] -= 1
    return np.asarray(p.T @ X / len(Y))


def _loss(weights: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(torch.from_numpy(X) @ weights.T, torch.from_numpy(Y))


def _sgd(
    lr: float, momentum: float = 0.0, dampening: float = 0.0, decay: float = 0.0, nesterov: bool = False
) -> Update:
    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        g = g + decay * w
        if not momentum:
            return w - lr * g
        state["b"] = g if t == 1 else momentum * state["b"] + (1 - dampening) * g
        return w - lr * (g + momentum * state["b"] if nesterov else state["b"])

    return update


def _adam(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    *,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> Update:
    first, second = betas

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        if decoupled:
            w = w - lr * decay * w
        else:
            g = g + decay * w
        state["m"] = first * state.get("m", 0.0) + (1 - first) * g
        state["v"] = second * state.get("v", 0.0) + (1 - second) * g**2
        v = state["v"]
        if amsgrad:
            v = state["most"] = np.maximum(state.get("most", 0.0), v)
        return w - lr * (state["m"] / (1 - first**t)) / (np.sqrt(v / (1 - second**t)) + eps)

    return update


def _adadelta(lr: float, rho: float = 0.9, eps: float = 1e-6) -> Update:
    """Zeiler 2012."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        state["v"] = rho * state.get("v", 0.0) + (1 - rho) * g**2
        change = np.sqrt(state.get("u", 0.0) + eps) / np.sqrt(state["v"] + eps) * g
        state["u"] = rho * state.get("u", 0.0) + (1 - rho) * change**2
        return w - lr * change

    return update


def _adagrad(lr: float, decay: float = 0.0, eps: float = 1e-10) -> Update:
    """Duchi et al. 2011."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        state["s"] = state.get("s", 0.0) + g**2
        return w - lr / (1 + (t - 1) * decay) * g / (np.sqrt(state["s"]) + eps)

    return update


def _adamax(lr: float, eps: float = 1e-8) -> Update:
    """Kingma & Ba 2015, section 7.1."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["u"] = np.maximum(0.999 * state.get("u", 0.0), np.abs(g) + eps)
        return w - lr / (1 - 0.9**t) * state["m"] / state["u"]

    return update


def _nadam(lr: float, eps: float = 1e-8, psi: float = 0.004) -> Update:
    """Dozat 2016."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        now, after = (0.9 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        state["p"] = state.get("p", 1.0) * now
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
        m = after * state["m"] / (1 - state["p"] * after) + (1 - now) * g / (1 - state["p"])
        return w - lr * m / (np.sqrt(state["v"] / (1 - 0.999**t)) + eps)

    return update


def _radam(lr: float, eps: float = 1e-8) -> Update:
    """Liu et al. 2020."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
        state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g**2
        m = state["m"] / (1 - 0.9**t)
        most = 2 / (1 - 0.999) - 1
        rho = most - 2 * t * 0.999**t / (1 - 0.999**t)
        if rho <= 5:
            return w - lr * m
        r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
        return w - lr * m * r * math.sqrt(1 - 0.999**t) / (np.sqrt(state["v"]) + eps)

    return update


def _rmsprop(
    lr: float, alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False
) -> Update:
    """Hinton's lecture 6e; centered as Graves 2013."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g**2
        v = state["v"]
        if centered:
            state["a"] = alpha * state.get("a", 0.0) + (1 - alpha) * g
            v = v - state["a"] ** 2
        state["b"] = momentum * state.get("b", 0.0) + g / (np.sqrt(v) + eps)
        return w - lr * state["b"]

    return update


def _rprop(lr: float) -> Update:
    """Riedmiller & Braun 1993, without going back."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        size, last = state.get("size", np.full_like(w, lr)), state.get("g", np.zeros_like(w))
        sign = np.sign(last * g)
        size = np.clip(np.where(sign > 0, size * 1.2, np.where(sign < 0, size * 0.5, size)), 1e-6, 50)
        g = np.where(sign < 0, 0.0, g)
        state.update(size=size, g=g)
        return w - np.sign(g) * size

    return update


def _asgd(lr: float, lambd: float = 1e-4, alpha: float = 0.75) -> Update:
    """Polyak & Juditsky 1992; the mean of the weights is kept beside, so these are the steps."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        eta = state.get("eta", lr)
        state["eta"] = lr / (1 + lambd * lr * t) ** alpha
        return w * (1 - lambd * eta) - eta * g

    return update


def _adafactor(lr: float, d: float = 1.0) -> Update:
    """Shazeer & Stern 2018: second moments as the outer product of those of rows and columns."""

    def update(w: Vector, g: Vector, t: int, state: dict[str, Any]) -> Vector:
        part = t**-0.8
        rate = max(1e-3, float(np.sqrt((w**2).mean()))) * min(lr, 1 / math.sqrt(t))
        for name, axis in (("rows", 1), ("columns", 0)):
            state[name] = (1 - part) * state.get(name, 0.0) + part * (g**2).mean(axis)
        v = np.outer(state["rows"], state["columns"]) / state["rows"].mean()
        change = g / np.sqrt(v)
        return w - rate * change / max(1.0, float(np.sqrt((change**2).mean())) / d)

    return update


CASES: Mapping[str, tuple[str, float, dict[str, Any], Update]] = {
    "gd": ("gd", 0.5, {}, _sgd(0.5)),
    "gd with decay": ("gd", 0.5, {"weight_decay": 0.1}, _sgd(0.5, decay=0.1)),
    "sgd": ("sgd", 0.1, {}, _sgd(0.1)),
    "sgd with momentum": ("sgd", 0.1, {"momentum": 0.9}, _sgd(0.1, 0.9)),
    "sgd with dampening": (
        "sgd",
        0.1,
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        _sgd(0.1, 0.9, 0.3, 0.01),
    ),
    "sgd of Nesterov": ("sgd", 0.1, {"momentum": 0.9, "nesterov": True}, _sgd(0.1, 0.9, nesterov=True)),
    "adam": ("adam", 0.05, {}, _adam(0.05)),
    "adam with other betas and decay": (
        "adam",
        0.05,
        {"betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.1},
        _adam(0.05, (0.8, 0.99), 1e-6, 0.1),
    ),
    "adam with amsgrad": ("adam", 0.05, {"amsgrad": True}, _adam(0.05, amsgrad=True)),
    "adamw": ("adamw", 0.05, {}, _adam(0.05, decay=0.01, decoupled=True)),
    "adamw with decay": ("adamw", 0.05, {"weight_decay": 0.5}, _adam(0.05, decay=0.5, decoupled=True)),
    "adadelta": ("adadelta", 1.0, {}, _adadelta(1.0)),
    "adafactor": ("adafactor", 0.01, {}, _adafactor(0.01)),
    "adagrad": ("adagrad", 0.1, {"lr_decay": 0.01}, _adagrad(0.1, 0.01)),
    "adamax": ("adamax", 0.02, {}, _adamax(0.02)),
    "asgd": ("asgd", 0.1, {}, _asgd(0.1)),
    "nadam": ("nadam", 0.02, {}, _nadam(0.02)),
    "radam": ("radam", 0.05, {}, _radam(0.05)),
    "rmsprop": ("rmsprop", 0.01, {}, _rmsprop(0.01)),
    "rmsprop, centered, with momentum": (
        "rmsprop",
        0.001,
        {"momentum": 0.9, "centered": True},
        _rmsprop(0.001, momentum=0.9, centered=True),
    ),
    "rprop": ("rprop", 0.01, {}, _rprop(0.01)),
}


def _optimizer(
    name: str, learning_rate: float, parameters: dict[str, Any], weights: torch.Tensor
) -> torch.optim.Optimizer:
    recipe = job_work_pb2.Recipe()
    recipe.optimizer.name = name
    recipe.optimizer.learning_rate = learning_rate
    recipe.optimizer.parameters.update(parameters)
    return optimizer_maker(plan_of(recipe))([weights])  # type: ignore[list-item]


def _begin() -> Vector:
    return np.random.default_rng(0).normal(0, 0.1, SHAPE)


@pytest.mark.parametrize("case", CASES)
def test_an_optimizer_follows_its_formula(case: str) -> None:
    name, learning_rate, parameters, update = CASES[case]
    weights = torch.from_numpy(_begin()).requires_grad_()
    optimizer = _optimizer(name, learning_rate, parameters, weights)
    expected, state = _begin(), dict[str, Any]()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        _loss(weights).backward()
        optimizer.step()
        expected = update(expected, _gradient(expected), step, state)
        # Of these, torch keeps a factor in float32 whatever the weights are.
        tolerance = 1e-8 if name in {"asgd", "nadam"} else 1e-11
        np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-9, atol=tolerance)


def test_lbfgs_follows_its_formula() -> None:
    """Nocedal 1980: the two loops over the last changes s of weights and y of gradients."""
    weights = torch.from_numpy(_begin()).requires_grad_()
    optimizer = _optimizer("lbfgs", 0.5, {"max_iter": 8, "history_size": 4}, weights)

    def closure() -> float:
        optimizer.zero_grad()
        loss = _loss(weights)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)

    w, changes = _begin().ravel(), list[tuple[Vector, Vector]]()
    g = _gradient(w.reshape(SHAPE)).ravel()
    for number in range(8):
        q, alphas = g.copy(), []
        for s, y in reversed(changes):
            alpha = s @ q / (y @ s)
            q -= alpha * y
            alphas.append(alpha)
        if changes:
            s, y = changes[-1]
            q *= (s @ y) / (y @ y)
        for (s, y), alpha in zip(changes, reversed(alphas), strict=True):
            q += (alpha - y @ q / (y @ s)) * s
        # torch makes the first step no longer than the learning rate.
        step = 0.5 * (min(1.0, 1 / np.abs(g).sum()) if number == 0 else 1.0)
        moved = -step * q
        new = _gradient((w + moved).reshape(SHAPE)).ravel()
        changes = [*changes, (moved, new - g)][-4:]
        w, g = w + moved, new
    np.testing.assert_allclose(weights.detach().numpy().ravel(), w, rtol=1e-9, atol=1e-11)


def test_every_optimizer_of_the_table_is_checked_here() -> None:
    assert {name for name, *_ in CASES.values()} | {"lbfgs"} == set(OPTIMIZERS)


def test_the_bias_of_adam_is_corrected_by_powers_of_beta() -> None:
    # Without the correction, the first step would be (1 − β₁)/√(1 − β₂) ≈ 3.2 times as long.
    weights = torch.from_numpy(_begin()).requires_grad_()
    optimizer = _optimizer("adam", 0.05, {}, weights)
    _loss(weights).backward()
    optimizer.step()
    moved = np.abs(weights.detach().numpy() - _begin())
    np.testing.assert_allclose(moved, 0.05, rtol=1e-4)
