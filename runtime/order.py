"""Which samples a step sees: a pure function of (seed, step), never of world size, strategy or interruptions.

The run reads one endless stream of positions 0, 1, 2, ...; step k takes `batch_size` of them. Position p lies in epoch
p // N and is that epoch's permutation at p % N. The permutation is a keyed Feistel network with cycle walking (Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002): no memory, no state, any position at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MASK64 = (1 << 64) - 1

Ints = NDArray[np.int64]


def mix(*words: int) -> int:
    """A 64-bit hash of whole numbers (splitmix64's finalizer over a running state): keys for seeds."""
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state ^ (word & _MASK64)) & _MASK64
        state = (state + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def sample_indices(positions: Ints, num_samples: int, seed: int, *, shuffle: bool) -> Ints:
    """Data set indices at positions of the stream, same shape. A batch may cross the end of an epoch."""
    epochs, offsets = np.divmod(positions, num_samples)
    if not shuffle:
        return offsets
    present, which = np.unique(epochs, return_inverse=True)
    epoch_keys = [mix(seed, int(epoch)) for epoch in present]
    round_keys = np.array([[mix(key, number) for key in epoch_keys] for number in range(_ROUNDS)], dtype=np.uint64)
    keys = round_keys[:, which.reshape(-1)]  # (round, position)
    return _permute(offsets.reshape(-1), num_samples, keys).reshape(offsets.shape)


def _permute(offsets: Ints, num_samples: int, keys: NDArray[np.uint64]) -> Ints:
    """The image of each offset under the permutation of range(num_samples) that its keys stand for."""
    half_bits = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
    values = _feistel(offsets.astype(np.uint64), half_bits, keys)
    while (outside := values >= num_samples).any():  # walk the cycle until back in range: at most 4 rounds on average
        values[outside] = _feistel(values[outside], half_bits, keys[:, outside])
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    with np.errstate(over="ignore"):
        for key in keys:
            word = right + key
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((word ^ (word >> np.uint64(31))) & mask)
    return (left << half_bits) | right
