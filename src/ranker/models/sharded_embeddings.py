"""Embedding tables whose rows are spread over the processes of a run, each row on one of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranker.data.batch import Batch
from ranker.data.schema import CategoricalFeature, Schema
from ranker.models.embeddings import INIT_RANGE, Tables, place
from ranker.models.sharding import Shard, ShardedCollection, ShardingSettings, Table

_BLOCK = 65_536
"""Rows that are drawn at a time. With ``by_block`` it decides the numbers, so it must not change."""


class ShardedTables(Tables):
    """The tables of a model, sharded by torchrec. What it returns is what ``EmbeddingTables`` returns.

        e_f = W_f[id_f]                 one-hot feature f
        e_f = mean over i of W_f[id_f,i]     multi-hot or sequence; an empty list gives 0

    The ids of a batch go to the processes that have their rows, and the embeddings come back: two exchanges forward,
    one backward. The tables move in the backward pass, by Adagrad on the gradient averaged over the processes, which
    is what DDP gives to the other weights:

        G <- G + g^2;  w <- w - lr * g / (sqrt(G) + eps)                            adagrad: G per coordinate
        G <- G + mean over the columns of the shard of g^2;  w likewise             rowwise_adagrad: G per row

    The module has no parameters and no state. Nothing that walks over a model (DDP, optimizers, snapshots, state_dict)
    sees the rows. ``shard`` must be called before the first batch, in all processes.

    A forward pass is collective: all processes must make the same number, an empty batch included.

    Args:
        schema: gives the features.
        settings: how to shard and train.
        seed: of ``init=by_block``.
        lr: learning rate until ``set_learning_rate``.

    Initial weights are uniform in [-0.05, 0.05]. ``init=as_local`` draws what ``EmbeddingTables`` draws: a run begins
    with the weights of a run with ``embeddings=local``, but each process draws the numbers of all rows, two times.
    ``init=by_block`` draws own rows only, in blocks with a generator each: the same weights on any number of processes.

    Attributes:
        handle: a parameter without elements, for the group of the optimizer that has the tables' learning rate.
    """

    def __init__(self, schema: Schema, settings: ShardingSettings, *, seed: int, lr: float) -> None:
        super().__init__()
        self.output_width = sum(f.embedding_dim for f in schema.categorical)
        self.settings, self._seed, self._lr = settings, seed, lr
        self._schema = schema
        self.tables = [_table(owner, schema) for owner in schema.categorical if not owner.table]
        self._keys = [f.name for f in (*schema.one_hot, *schema.ragged)]
        self._collection: ShardedCollection | None = None
        # In a list: as an attribute it would be a parameter of the model.
        self._handle = [nn.Parameter(torch.empty(0))]
        self._start = torch.get_rng_state()
        if settings.init == "as_local":
            _skip_draws(schema)  # the layers, which come next, get the numbers of a local run

    @property
    def handle(self) -> nn.Parameter:
        """See the class."""
        return self._handle[0]

    @property
    def collection(self) -> ShardedCollection:
        """The sharded tables; ``shard`` must have been called."""
        assert self._collection is not None, "shard() comes first"
        return self._collection

    @property
    def is_sharded(self) -> bool:
        """Whether ``shard`` was called."""
        return self._collection is not None

    def count(self) -> int:
        """As in ``Tables``."""
        return sum(table.rows * table.dim for table in self.tables)

    def described(self) -> str:
        """The plan in one line: how many tables are sharded in which way, and what this process has."""
        kinds = Counter(line.split(": ")[1].split(" ")[0] for line in self.collection.plan)
        ways = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        own = sum(s.weight.nbytes + s.accumulator.nbytes for s in self.collection.shards)
        total, size = sum(table.rows for table in self.tables), self._group.size()
        return f"{total:,} rows over {size} processes ({ways}); {own / 2**20:,.1f} MiB here, accumulators included"

    @torch.no_grad()
    def shard(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Plans, allocates this process's rows and gives them their initial weights. All processes of a group call it.

        Raises:
            UserError: torchrec is missing or has no plan.
        """
        self._collection = ShardedCollection(self.tables, self.settings, lr=self._lr, group=group, device=device)
        self._group, self._device = group, device
        if self.settings.init == "as_local":
            self._draw_as_local()
        else:
            self._draw_by_block()

    def set_learning_rate(self, lr: float) -> None:
        """The learning rate of the next backward pass."""
        if lr != self._lr:
            self._lr = lr
            self.collection.set_learning_rate(lr)

    def pieces(self, batch: Batch) -> list[Tensor]:
        """As in ``Tables``."""
        if not self._keys:
            return []
        rows = len(batch)
        stride = self._largest(rows)
        values, lengths = self._jagged(batch, stride)
        found = self.collection(self._keys, values, lengths, stride=stride)
        return [self._pooled(found[f.name][:rows], f, batch) for f in self._schema.categorical]

    def _pooled(self, sums_BD: Tensor, feature: CategoricalFeature, batch: Batch) -> Tensor:
        if feature.kind == "one_hot":
            return sums_BD
        return sums_BD / batch.ragged[feature.name].offsets.diff().clamp(min=1).unsqueeze(1)

    def _jagged(self, batch: Batch, stride: int) -> tuple[Tensor, Tensor]:
        """Rows of all features and the length of each list, padded with empty lists to ``stride`` rows."""
        rows, columns = batch.onehot_BC.shape
        lists = [batch.ragged[f.name] for f in self._schema.ragged]
        lengths = torch.zeros(len(self._keys), stride, dtype=torch.int32, device=batch.onehot_BC.device)
        lengths[:columns, :rows] = 1
        for number, part in enumerate(lists, columns):
            lengths[number, :rows] = part.offsets.diff()
        values = torch.cat([batch.onehot_BC.t().reshape(-1), *(part.values for part in lists)])
        return values, lengths.view(-1)

    def _largest(self, rows: int) -> int:
        """The most rows of any process, at least 1. torchrec exchanges lists of as many rows by all."""
        if self._group.size() == 1:
            return max(rows, 1)
        most = torch.tensor(max(rows, 1), device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._group)
        return int(most)

    def _draw_as_local(self) -> None:
        drawn = torch.Generator()
        drawn.set_state(self._start)
        start, rows = place(self._schema)
        first = {table.name: start[table.name] for table in self.tables}
        for dim, count in sorted(rows.items()):
            own = [s for s in self.collection.shards if self._dim_of(s.table) == dim]
            for low in range(0, count, _BLOCK):
                high = min(low + _BLOCK, count)
                block = torch.empty(high - low, dim).uniform_(-INIT_RANGE, INIT_RANGE, generator=drawn)
                for shard in own:
                    _put(block, low - first[shard.table], shard)

    def _draw_by_block(self) -> None:
        for number, table in enumerate(self.tables):
            own = [s for s in self.collection.shards if s.table == table.name]
            for low in range(0, table.rows, _BLOCK):
                high = min(low + _BLOCK, table.rows)
                if any(s.row < high and low < s.row + len(s.weight) for s in own):
                    words = np.random.SeedSequence([self._seed, number, low // _BLOCK]).generate_state(1, np.uint64)
                    drawn = torch.Generator().manual_seed(int(words[0]))
                    block = torch.empty(high - low, table.dim).uniform_(-INIT_RANGE, INIT_RANGE, generator=drawn)
                    for shard in own:
                        _put(block, low, shard)

    def _dim_of(self, name: str) -> int:
        return next(table.dim for table in self.tables if table.name == name)


def _table(owner: CategoricalFeature, schema: Schema) -> Table:
    features = [f.name for f in (*schema.one_hot, *schema.ragged) if schema.table_of(f).name == owner.name]
    return Table(name=owner.name, rows=owner.rows, dim=owner.embedding_dim, features=features)


def _skip_draws(schema: Schema) -> None:
    """Advances torch's generator as the initialisation of ``EmbeddingTables`` does."""
    _, rows = place(schema)
    for dim, count in sorted(rows.items()):
        for low in range(0, count, _BLOCK):
            torch.empty(min(_BLOCK, count - low), dim).uniform_(-INIT_RANGE, INIT_RANGE)


def _put(block: Tensor, low: int, shard: Shard) -> None:
    """Copies the rows ``low .. low + len(block) - 1`` of a table into a shard, as far as it has them."""
    height, width = shard.weight.shape
    first, last = max(low, shard.row), min(low + len(block), shard.row + height)
    if first < last:
        part = block[first - low : last - low, shard.column : shard.column + width]
        shard.weight[first - shard.row : last - shard.row].copy_(part)
