"""What the last step had to do, taken again by the next one.

Finding that out takes longer than a small model's step, and from one step to the next little but the gradients changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optim.batch import Batch

if TYPE_CHECKING:
    from optim.optimizer import SigmaOptimizer


@dataclass(frozen=True, slots=True)
class _Group:
    """A parameter group as it was. Its values are compared by identity: a tensor's numbers would wait for the device.

    Attributes:
        settings: The group itself.
        names: Of all its entries but the learning rate, which every step reads anew.
        values: These entries.
        params: What its list of parameters held.
        resting: Those of them that had no gradient.
    """

    settings: Mapping[str, Any]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    params: tuple[Tensor, ...]
    resting: tuple[Tensor, ...]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> _Group:
        names = tuple(name for name in settings if name != "lr")
        params = tuple(settings["params"])
        resting = tuple(param for param in params if param.grad is None)
        return cls(settings, names, tuple(settings[name] for name in names), params, resting)

    def is_still(self, settings: Mapping[str, Any]) -> bool:
        params = settings["params"]
        return (
            settings is self.settings
            and len(settings) == len(self.names) + 1
            and all(map(is_, map(settings.get, self.names), self.values))
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(param.grad is None for param in self.resting)
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The batches of a step, and what they depend on. Holds no gradients, which are the training loop's to free.

    Attributes:
        batches: What the step did.
        groups: The parameter groups.
        backend: Which backends were allowed.
    """

    batches: list[Batch]
    groups: tuple[_Group, ...]
    backend: str

    @classmethod
    def of(cls, optimizer: SigmaOptimizer, batches: list[Batch]) -> Plan | None:
        """Return the plan of a step just taken; None where a backend cannot take it again as it is."""
        if not all(batch.backend.renew(batch) for batch in batches):
            return None
        return cls(batches, tuple(map(_Group.of, optimizer.param_groups)), optimizer.defaults["backend"])

    def renew(self, optimizer: SigmaOptimizer) -> bool:
        """Bring the next step's gradients into the batches; False where anything else has changed."""
        groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
        return (
            optimizer.defaults["backend"] == self.backend
            and len(groups) == len(self.groups)
            and all(group.is_still(settings) for group, settings in zip(self.groups, groups, strict=True))
            and all(_keeps_state(batch, optimizer.state) for batch in self.batches)
            and all(batch.backend.renew(batch) for batch in self.batches)
        )

    def rest(self) -> Plan:
        """Let go of the gradients until the next step."""
        for batch in self.batches:
            for work in batch.works:
                del work.grad
        return self


def _keeps_state(batch: Batch, state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Whether the optimizer still has the state that the works were made with."""
    for work in batch.works:
        now = state.get(work.param, {})
        if any(now.get(key) is not value for key, value in work.kept.items()):
            return False
    return True
