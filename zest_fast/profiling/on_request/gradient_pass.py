"""Passes beside the one of a profile: a forward and a backward that hand over each dW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from torch import Tensor, nn

from zest_fast.profiling.borrowing.model_state import ModelState
from zest_fast.profiling.layer_rules import linear_gradient_factors
from zest_fast.profiling.layers import Layer, Weight
from zest_fast.profiling.loss import RepeatedLoss, check_loss
from zest_fast.profiling.taps import Routes, Taps, run_until_it_stands
from zest_fast.profiling.watched import Watched

Receive = Callable[[Weight, Tensor], None]
ReceiveFactors = Callable[[Weight, Tensor, Tensor], None]


class GradientPass:
    """Runs losses of one model again and again, each from the buffers, modes and random state of a plain forward.

    Args:
        layers: whose weights require a gradient (inside ``state``).
        embeddings: as for ``Taps``.
        state: what a pass starts from; entered.
    """

    def __init__(self, layers: Iterable[Layer], embeddings: Iterable[nn.Module], state: ModelState) -> None:
        self.layers = list(layers)
        self.embeddings = list(embeddings)
        self._state = state

    @property
    def weights(self) -> list[Weight]:
        """Every weight, once."""
        return list({layer.weight: None for layer in self.layers})

    def rewind(self) -> None:
        """Everything as before the first pass."""
        self._state.clear_gradients()
        self._state.rewind()

    def replaced(
        self, tensors: Iterable[Tensor], change: Callable[[int, Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """Parameters with other values in all passes inside (see ``ModelState.replaced``)."""
        return self._state.replaced(tensors, change)

    def loss(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        """The loss of a forward from the state of the first; what the forward writes is restored later."""
        self.rewind()
        loss = self._state.guarded(compute_loss)()
        check_loss(loss)
        self._state.clear_gradients()  # a loss that runs a backward pass by itself leaves some
        return loss

    def run(
        self, compute_loss: Callable[[], Tensor], receive: Receive, receive_factors: ReceiveFactors | None = None
    ) -> None:
        """One forward and one backward; ``receive`` gets (weight, dW), all uses together, one dW at a time.

        Where ``receive_factors`` is given, dW of a linear layer with one use is not formed: it gets (weight, L, R) with
        dW = LᵀR. Either may be called again for a weight, with what then counts: some models show only while they run
        how their gradients have to be collected (see ``Taps.revised``).
        """
        repeated = RepeatedLoss(self._state.parameters)

        def make(routes: Routes) -> Taps:
            return Taps(
                self.layers,
                self.embeddings,
                [],
                _Receiver(receive, receive_factors),
                routes,
                Watched(gradients=True),
            )

        def once(taps: Taps) -> Tensor:
            with taps:
                loss = self.loss(compute_loss)
                repeated.check(loss, taps.may_change_the_loss)
                taps.backward(loss, self._state.parameters)
            return loss

        def prepare(routes: Routes) -> None:
            self._state.set_flags(own=routes.own_flags)

        run_until_it_stands(make, once, prepare, Routes(tiles=receive_factors is not None))


class _Receiver:
    """The observer of taps that watch weight gradients only."""

    def __init__(self, receive: Receive, receive_factors: ReceiveFactors | None) -> None:
        self._receive = receive
        self._receive_factors = receive_factors

    def weight_gradient(self, weight: Weight, dw: Tensor) -> None:
        self._receive(weight, dw.detach())

    def linear(self, layer: Layer, x: Tensor, g: Tensor) -> None:
        assert self._receive_factors is not None  # without it no weight is on the tile route
        self._receive_factors(layer.weight, *linear_gradient_factors(layer.module, x, g))

    def output(self, *_: object) -> None:
        raise AssertionError("outputs are not observed")

    output_gradient = untouched = output

    def missed(self, layer: Layer, why: str, *, outputs: bool) -> None:
        """Outputs are not observed."""
