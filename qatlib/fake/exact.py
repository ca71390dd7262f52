"""The exact forward: the fake-quant model computes the integers of its Program, and trains through its own gradients.

The Program is made of weights and scales as they are and run by the emulator; every value that it holds takes the place
of the fake-quant model's. The gradient passes as if nothing had been replaced. So the loss of a step is the loss of the
integers, and there is no distance left between fake-quant and integer for training to miss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatlib.conversion import IntegerModel, convert_fx
from qatlib.emulator import Emulator
from qatlib.errors import QatError
from qatlib.fake.guards import check_weights
from qatlib.fake.model import FakeQuantModel, set_fake_quantize
from qatlib.fake.state import FakeQuantState
from qatlib.graph.ir import Node
from qatlib.program import Op


class _Instead(torch.autograd.Function):
    """The second tensor; the gradient goes to the first."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class ExactForward:
    """Called as the model is, in QAT or VALIDATION state; every value is the real number behind the Program's integer.

    Args:
        convert: makes the integers, by default with default tables and 20-bit multipliers.

    Moving scales move as they do in the usual forward; the integers of a step are those of the scales before it. Each
    call converts the model, so a step costs the conversion, the emulation and the usual forward and backward.
    """

    def __init__(self, model: FakeQuantModel, convert: Callable[[FakeQuantModel], IntegerModel] = convert_fx) -> None:
        self.model, self._convert = model, convert
        self.islands: tuple[str, ...] = ()
        """Ops without an integer form, after a call: their values are floats, rounded by the same rule."""

    def __call__(self, *inputs: Tensor) -> Any:
        """Outputs as the model's, differentiable in its parameters. Raises as ``convert_fx``, and TrainingError
        (QAT162) for weights that are not finite.
        """
        exact = self._integers(inputs)

        def instead(node: Node, computed: Tensor) -> Tensor:
            if not computed.is_floating_point():
                return computed
            replaced: Tensor = _Instead.apply(computed, exact[node.name])  # type: ignore[no-untyped-call]
            return replaced

        return self.model.substituted(*inputs, instead=instead)

    def _integers(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Real numbers of every node's value, float32."""
        state = self.model.state
        if state is FakeQuantState.QAT:
            for _, op in self.model.ops():
                op.start_learning()
        set_fake_quantize(self.model, FakeQuantState.VALIDATION)
        try:
            program = self._convert(self.model).program
        except QatError:
            check_weights(self.model, "exact forward")
            raise
        finally:
            set_fake_quantize(self.model, state)
        self.islands = tuple(op.name for op in program.islands())
        emulator = Emulator(program, inputs[0].device)
        wanted = {name for name, _ in self.model.ops()}
        found: dict[str, Tensor] = {}

        def keep(op: Op, given: tuple[Tensor, ...], carrier: Tensor) -> None:
            if op.output in wanted:
                found[op.output] = emulator.real(op.output, carrier)

        emulator.walk(*inputs, visit=keep)
        return {name: real.clone() for name, real in found.items()}  # of inference mode, out of it
