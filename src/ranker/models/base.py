"""What every ranker has in common, whatever lies between its input and its heads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import Schema
from ranker.models.embeddings import EmbeddingTables


class Ranker(nn.Module, ABC):
    """Base of the models: input features, names, counts. A model adds its layers, ``forward`` and ``layer_names``.

    Names of all embedding parameters, and of no others, start with ``embeddings.``: that is how an optimizer tells
    the two groups apart.

    Args:
        schema: the features to read and the tasks to predict.
        sparse_embeddings: give sparse gradients for the embedding tables.

    Attributes:
        task_names: tasks, in the order of the logits.
        input_width: D, dense features plus all embeddings.
        embeddings: the embedding tables.
    """

    def __init__(self, schema: Schema, *, sparse_embeddings: bool = False) -> None:
        super().__init__()
        self.task_names = schema.task_names
        self.embeddings = EmbeddingTables(schema, sparse=sparse_embeddings)
        self.input_width = len(schema.dense) + self.embeddings.output_width

    def features(self, batch: Batch) -> Tensor:
        """The input x_BD: dense features, transformed by the data path, then embeddings, both in the schema's order."""
        pieces = [batch.dense_BF, *self.embeddings.pieces(batch)]
        return torch.cat(pieces, dim=1)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Logits_BT of a batch: log odds of a binary task, the transformed label's estimate of a regression."""

    @abstractmethod
    def layer_names(self) -> dict[str, str]:
        """Module names of layers worth watching, from the input upward.

        Returns:
            By role: ``dcn`` (first cross layer; only where there is one), ``bottom_first`` and ``bottom_top`` (lowest
            and highest shared layer; where there are many experts, those of the first shared one) and ``head/<task>``.
            ``module name + ".weight"`` (for ``dcn`` any parameter below it) is a parameter's name.
        """

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters, ``embedding`` and ``dense`` (all the rest, which the paper's Table 1 counts)."""
        embedding = sum(p.numel() for p in self.embeddings.parameters())
        return {"embedding": embedding, "dense": sum(p.numel() for p in self.parameters()) - embedding}
