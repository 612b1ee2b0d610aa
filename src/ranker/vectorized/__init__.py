"""Many runs trained as one: replicas that differ only in seed, learning rate or optimizer share every batch.

    weights of a layer     [K, out, in], one slice per replica
    embedding tables       [K, rows, D]; only the rows that a batch touches are stepped
    logits                 [B, K * T], the tasks of one replica beside those of the next

``alike`` says which jobs may be trained together, ``replica`` is one job, a whole run but for its step. ``tables``,
``stack`` and ``steps`` hold weights and optimizer, ``feed`` the batches, ``group`` the loop. Each replica leaves a run
folder as if it had run alone.
"""
