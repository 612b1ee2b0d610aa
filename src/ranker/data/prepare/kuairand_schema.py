"""The schema of prepared KuaiRand-Pure: every feature of users, videos and the moment, and seven tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ranker.data.schema import CategoricalFeature, DenseFeature, Schema, Task

TABS = 15  # places in the app where a video is shown
HISTORY_LENGTH = 50


def kuairand_schema(
    *, codes: Mapping[str, int], tags: int, vocabularies: Mapping[str, Sequence[str]], with_history: bool
) -> Schema:
    """Builds the schema from what the side tables hold.

    Args:
        codes: by name of a column of whole numbers 0 .. n-1, its n.
        tags: number of tags, which are 0 .. n-1 as well.
        vocabularies: by name of a text column, its values.
        with_history: whether there is a table of what users watched before.
    """
    categorical = [CategoricalFeature(name=name, num_embeddings=size) for name, size in codes.items()]
    categorical += [CategoricalFeature(name=name, vocabulary=tuple(v)) for name, v in vocabularies.items()]
    categorical.append(CategoricalFeature(name="tab", num_embeddings=TABS))
    categorical.append(CategoricalFeature(name="hour", num_embeddings=24))
    categorical.append(CategoricalFeature(name="tag", kind="multi_hot", num_embeddings=tags))
    if with_history:
        watched = CategoricalFeature(name="history", kind="sequence", table="video_id", max_length=HISTORY_LENGTH)
        categorical.append(watched)
    return Schema(
        name="kuairand",
        time_column="time_ms",
        dense=_dense(),
        categorical=tuple(categorical),
        tasks=_tasks(),
    )


def _dense() -> tuple[DenseFeature, ...]:
    counts = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    return (
        *(DenseFeature(name=name, transform="log1p", fill_null=0.0) for name in counts),
        # Milliseconds to seconds. 0 stands for unknown in both: the log has it so, the side table has null.
        DenseFeature(name="duration_ms", transform="log1p", scale=1e-3, fill_null=0.0),
        DenseFeature(name="video_duration", transform="log1p", scale=1e-3, fill_null=0.0),
        DenseFeature(name="upload_age_days", transform="log1p", fill_null=0.0),
        DenseFeature(name="server_width", scale=1e-3, fill_null=0.0),
        DenseFeature(name="server_height", scale=1e-3, fill_null=0.0),
    )


def _tasks() -> tuple[Task, ...]:
    binary = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_profile_enter")
    watch_time = Task(name="watch_time", type="regression", column="play_time_ms", scale=1e-3, transform="log1p")
    return (*(Task(name=name) for name in binary), watch_time)
