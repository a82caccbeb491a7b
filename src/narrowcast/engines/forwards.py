"""Replacing a module's forward, exactly undone; and lending a module other weights for one call."""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import InvalidInputError

Forward = Callable[..., Any]


class Bound:
    """A function bound to a module that it does not keep alive, as a method in the module's own attributes would.

    Copies of the module have their own.
    """

    def __init__(self, function: Forward, module: nn.Module) -> None:
        self.function, self._module = function, weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self._module(), *args, **kwargs)

    def __reduce__(self) -> Any:
        return Bound, (self.function, self._module())


def has_own_forward(module: nn.Module) -> bool:
    """True if somebody else has given this very module a forward, as quantizers and offloading do."""
    forward = vars(module).get("forward")
    return forward is not None and not hasattr(forward, "narrowcast")


def _refuse_copy(_: object) -> Any:
    raise InvalidInputError(
        "model",
        expected="one without a plan, to be copied",
        found="one that has a plan attached: its copy would compute with the weights of this one",
        remedy="Copy it before, or call remove() or suspend() on its handle first.",
    )


class Forwards:
    """Attributes of modules that were replaced, `forward` above all."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []  # owner, name, what it had, what it was given

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Let `module` call `forward`, without gradients. Training on it raises InvalidInputError."""

        @functools.wraps(module.forward)  # engines look at the signature to see what a model takes
        def inference(*args: Any, **kwargs: Any) -> Any:
            if module.training and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                raise InvalidInputError(
                    "model",
                    expected="inference",
                    found="training: a forward in train mode with gradients",
                    remedy="Call model.eval(), or remove() the plan before training.",
                )
            with torch.no_grad():
                return forward(*args, **kwargs)

        inference.narrowcast = True  # type: ignore[attr-defined]
        self.set(module, "forward", inference)
        self.set(module, "__deepcopy__", _refuse_copy)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Give `owner` an attribute of its own."""
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT), value))
        vars(owner)[name] = value

    def suspend(self) -> None:
        """Give everything back what it had, until `resume`."""
        for owner, name, original, _ in reversed(self._replaced):
            if original is _ABSENT:
                del vars(owner)[name]
            else:
                vars(owner)[name] = original

    def resume(self) -> None:
        """Replace again what `suspend` gave back."""
        for owner, name, _, value in self._replaced:
            vars(owner)[name] = value

    def restore(self) -> None:
        """Give everything back what it had, for good."""
        self.suspend()
        self._replaced.clear()


_ABSENT = object()


def call_with(module: nn.Module, attributes: dict[str, Any], *args: Any, forward: Forward | None = None) -> Any:
    """Call `forward` (by default of the module's class) with these parameters and attributes standing in."""
    with _lent(module, attributes):
        return (forward or type(module).forward)(module, *args)


@contextmanager
def _lent(module: nn.Module, attributes: dict[str, Any]) -> Iterator[None]:
    homes = {name: module._parameters if name in module._parameters else vars(module) for name in attributes}
    originals = {name: home[name] for name, home in homes.items()}
    try:
        for name, home in homes.items():
            home[name] = attributes[name]
        yield
    finally:
        for name, home in homes.items():
            home[name] = originals[name]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def chunk(size: int, rank: int, tp_size: int) -> slice:
    """The part of a dimension that `rank` holds by DTensor's rule (torch.chunk): the last may hold less, or none."""
    width = -(-size // tp_size)
    return slice(min(rank * width, size), min((rank + 1) * width, size))


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """The bias is added once, after the sum."""
    return y if bias is None else y + bias
