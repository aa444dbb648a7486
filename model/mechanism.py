"""The mechanisms that MoCo compares (figure 2), behind one interface.

A mechanism is an encoder module, which makes pairs of queries and keys inside the data-parallel
wrapper, and a dictionary, which compares them outside of it.

| mechanism     | keys from                        | negatives                        |
|---------------|----------------------------------|----------------------------------|
| `queue`       | key encoder, no gradient         | the newest K keys                |
| `memory-bank` | the pictures' entries            | K entries of other pictures      |
| `end-to-end`  | query encoder, with gradient     | the other keys of the batch      |
| `batch`       | key encoder, no gradient         | the other keys of the batch      |

Letters in names: D embedding size.
"""

import math

import torch

from model.dictionary import Dictionary
from model.end_to_end import BatchKeys, EndToEnd
from model.key_queue import KeyQueue
from model.memory_bank import BankEncoder, MemoryBank
from model.moco import MoCo, MoCoConfig, QueryEncoder

ENCODERS: dict[str, type[QueryEncoder]] = {
    "queue": MoCo,
    "memory-bank": BankEncoder,
    "end-to-end": EndToEnd,
    "batch": MoCo,
}


def make_dictionary(config: MoCoConfig, dim: int, samples: int, seed: int) -> Dictionary:
    """The dictionary of a mechanism.

    Args:
        config: of the method.
        dim: D.
        samples: pictures of the data set.
        seed: of the run.
    """
    if config.mechanism == "queue":
        dtype = getattr(torch, config.queue_dtype)
        return KeyQueue(config.queue, dim, seed, dtype, overlaps=config.overlap_gather)
    if config.mechanism == "memory-bank":
        return MemoryBank(
            samples, dim, drawn=config.queue, momentum=config.bank_momentum, seed=seed
        )
    return BatchKeys()


def loss_scale(config: MoCoConfig) -> float:
    """What the loss of a pair is multiplied with."""
    return 2 * config.temperature if config.loss_2t else 1.0


def chance_loss(config: MoCoConfig, candidates: int) -> float:
    """The loss of a step where all similarities are equal, in nats."""
    return (2 if config.symmetric else 1) * loss_scale(config) * math.log(candidates)
