"""Stable hashes of integers and byte strings, vectorised: the same on every machine and in every version."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: npt.NDArray[np.int64] | UInt64s) -> UInt64s:
    """Mixes 64-bit integers. Neighbouring ids get unrelated values. The map is one to one, so no two ids collide.

        z = x + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z =  z ^ (z >> 31)                             all modulo 2^64

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The constants are those
    of Stafford's variant 13.
    """
    z = values.astype(np.uint64)  # a copy, changed in place
    z += _GOLDEN
    shifted = np.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        z ^= np.right_shift(z, np.uint64(shift), out=shifted)
        z *= np.uint64(factor)
    return z


def hash_bytes(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> UInt64s:
    """Hashes many byte strings at once.

        h(s) = mix(len(s) + sum_i mix(i) * (s_i + 1))          modulo 2^64, mix = splitmix64

    This is a multilinear hash. Two strings collide with a probability of about 2^-64.

    Args:
        data: the strings' bytes (UTF-8), concatenated.
        offsets: string i is ``data[offsets[i] : offsets[i + 1]]``, shape [N + 1].

    Returns:
        uint64, shape [N].
    """
    lengths = np.diff(offsets)
    place = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], lengths)
    weights = splitmix64(np.arange(int(lengths.max(initial=0)), dtype=np.int64))
    terms = weights[place] * (data[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1))
    # Differences of a running sum, because np.add.reduceat does not support empty segments.
    sums = np.zeros(len(terms) + 1, dtype=np.uint64)
    np.cumsum(terms, out=sums[1:])
    bounds = offsets - offsets[0]
    return splitmix64(sums[bounds[1:]] - sums[bounds[:-1]] + lengths.astype(np.uint64))
