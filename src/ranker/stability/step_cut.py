"""By how much the last steps cut the step size of the coordinates: the accumulators now beside those some steps ago."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949


class LayerCut(NamedTuple):
    """What the last steps did to the step size of one layer; scalars on its device, nan without an accumulator.

    Attributes:
        cut: median over the coordinates of sqrt(G_now / G_before): the median step is this many times smaller.
        grown: share of the coordinates whose G grew more than tenfold.
    """

    cut: Tensor
    grown: Tensor


class StepCut:
    """Compares the accumulators of chosen weights with what they were ``span`` steps ago.

        cut = median over coordinates of sqrt(G_now / G_before)        grown = share with G_now > 10 G_before

    Adagrad divides a gradient by sqrt(G), and G never falls, so a step size that was cut stays cut. A healthy run adds
    one gradient's square to G at each step, and G grows slowly: after the first steps the cut is near 1. One spike of
    the gradients can make G a thousand times larger within a few steps.

    It never reads all of G. Of each tensor it gathers the same few coordinates every few steps, into a ring on the
    device. Nothing waits for the device. The coordinates are spread over the tensor by multiples of the golden ratio,
    so that they do not fall into a few columns of a matrix. The standard error of the share of a layer is at most
    0.5 / sqrt(sample), 0.03 with the default.

    Adam's accumulator v forgets: a spike multiplies it as it multiplies G, but the excess halves every
    ln 2 / (1 - beta2) steps (693 with beta2 = 0.999), and the step size comes back. The cut is that of
    v / (1 - beta2^t), shows the same spike, and is below 1 afterwards. A cut of 200 is gone after about 10,600 steps.

    Every rank of DDP has the same accumulators, hence the same values. Of a sharded accumulator each rank samples its
    own part.

    Args:
        weights: tensors to watch, by name of the layer.
        optimizer: the optimizer that steps them. Its accumulators are looked up at each sample, because optimizers make
            them late and replace them on loading a checkpoint.
        every: steps between two samples.
        span: number of steps that the comparison reaches back; a multiple of ``every``. Fewer at the start.
        sample: number of coordinates per tensor.

    Attributes:
        names: names of the layers, in order.

    Raises:
        ValueError: a number is below 1, or the span is no multiple of ``every``.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 4,
        span: int = 24,
        sample: int = 256,
    ) -> None:
        if min(every, span, sample) < 1 or span % every:
            raise ValueError(
                f"step cut: numbers of at least 1 are needed, and a span that is a multiple of every; "
                f"got every={every}, span={span}, sample={sample}"
            )
        self.names: Sequence[str] = tuple(weights)
        self._weights = list(weights.values())
        self._optimizer = optimizer
        self._every, self._sample = every, sample
        self._coordinates: dict[tuple[int, torch.device], Tensor] = {}  # by number of elements
        self._ring: deque[Tensor] = deque(maxlen=span // every + 1)  # [layers, sample], newest last
        self._count = 0  # steps since the start or the last reset
        self._cut_L, self._grown_L, self._reduced_3 = self._unknown()

    @torch.no_grad()
    def update(self) -> Tensor:
        """Takes note of a step of the optimizer that was just made; call it after each.

        Returns:
            [3] on the device: the largest cut of a layer, the median over the layers of their cuts, the largest
            share of grown coordinates. nan as long as there is nothing to compare.
        """
        if self._count % self._every == 0 and self._weights:
            self._take()
        self._count += 1
        return self._reduced_3

    def by_layer(self) -> dict[str, LayerCut]:
        """The last comparison, by name of the layer."""
        return {
            name: LayerCut(cut, grown)
            for name, cut, grown in zip(self.names, self._cut_L.unbind(), self._grown_L.unbind(), strict=True)
        }

    def reset(self) -> None:
        """Forgets the past; the next comparison begins at the next step."""
        self._ring.clear()
        self._count = 0
        self._cut_L, self._grown_L, self._reduced_3 = self._unknown()

    def state_dict(self) -> dict[str, Any]:
        """The samples and the last comparison. Loads with ``weights_only=True``."""
        return {
            "names": list(self.names),
            "count": self._count,
            "ring": list(self._ring),
            "last": [self._cut_L, self._grown_L, self._reduced_3],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from ``state_dict()``; starts anew if it is of other layers or of another sample."""
        fits = list(state["names"]) == list(self.names) and all(
            x.shape == (len(self.names), self._sample) for x in state["ring"]
        )
        self.reset()
        if not fits or not self._weights:
            return
        device = self._weights[0].device
        self._count = int(state["count"])
        self._ring.extend(x.to(device, copy=True) for x in state["ring"])
        self._cut_L, self._grown_L, self._reduced_3 = (x.to(device, copy=True) for x in state["last"])

    def _unknown(self) -> tuple[Tensor, Tensor, Tensor]:
        device = self._weights[0].device if self._weights else torch.device("cpu")
        unknown_L = torch.full((len(self._weights),), torch.nan, device=device)
        return unknown_L, unknown_L, torch.full((3,), torch.nan, device=device)

    def _take(self) -> None:
        now_LN = torch.stack([self._sampled(weight) for weight in self._weights])
        self._ring.append(now_LN)
        before_LN = self._ring[0]
        if len(self._ring) == 1:
            return
        # An accumulator that is nan divides nothing any more; one that did not change has cut nothing, also at 0.
        growth_LN = torch.where(now_LN == before_LN, 1.0, now_LN / before_LN)
        growth_LN.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        absent_L = before_LN[:, 0].isnan() & now_LN[:, 0].isnan()
        self._cut_L = growth_LN.median(dim=1).values.sqrt_().masked_fill_(absent_L, torch.nan)
        self._grown_L = (growth_LN > 10.0).float().mean(1).masked_fill_(absent_L, torch.nan)
        # nan is larger than any number for max, and the comparison of one layer must not hide that of the others.
        known_L = self._cut_L.nan_to_num(nan=-1.0, posinf=torch.inf), self._grown_L.nan_to_num(nan=-1.0)
        middle = self._cut_L.nanmedian()
        reduced_3 = torch.stack([known_L[0].amax(), middle, known_L[1].amax()])
        self._reduced_3 = reduced_3.masked_fill_(middle.isnan(), torch.nan)

    def _sampled(self, weight: Tensor) -> Tensor:
        """The accumulator at the layer's coordinates, float32 [sample]; nan where there is none."""
        found = _accumulator(self._optimizer, weight)
        if found is None or not found[0].numel():
            return torch.full((self._sample,), torch.nan, device=weight.device)
        total, correction = found
        key = total.numel(), total.device
        if key not in self._coordinates:
            fraction_N = torch.arange(self._sample, dtype=torch.float64).mul_(_GOLDEN).frac_()
            self._coordinates[key] = (fraction_N * total.numel()).long().to(total.device)
        values_N = total.reshape(-1).index_select(0, self._coordinates[key]).float()
        return values_N if correction is None else values_N / correction


def shared_weights(
    named_parameters: Iterable[tuple[str, Tensor]], *, heads: Collection[str], embeddings: str = "embeddings."
) -> dict[str, Tensor]:
    """The matrices that the tasks share, by module name: hidden, cross and expert layers, and gates.

    Args:
        named_parameters: those of the net.
        heads: module names of the heads, which are left out.
        embeddings: start of the names of the embedding tables, which are left out.
    """
    found = {}
    for name, parameter in named_parameters:
        layer = name.rpartition(".")[0]
        if parameter.ndim >= 2 and parameter.requires_grad and not name.startswith(embeddings) and layer not in heads:
            found[layer] = parameter
    return found


def _accumulator(optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """G or v of a weight, and what to divide it by; None where there is none."""
    state = optimizer.state.get(weight, {})
    if "sum" in state:
        return _local(state["sum"]), None
    if "exp_avg_sq" not in state:
        return None
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    beta2 = float(group["betas"][1])
    return _local(state["exp_avg_sq"]), 1.0 - torch.pow(beta2, torch.as_tensor(state["step"]))


def _local(value: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return value.to_local() if hasattr(value, "to_local") else value
