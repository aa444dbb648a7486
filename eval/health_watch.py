"""Looks at the dictionary of a run every so many steps, before a step's own keys go in.

Only the main process looks, at its own queries; the queue is the same on all of them.

Letters in names: N images on this process, D embedding size, K queue length,
S pictures of the data set.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model.dictionary import Dictionary, Pairs
from model.health import RecentLabels, encoder_distance, key_age, measure, some_rows
from model.key_queue import KeyQueue
from model.memory_bank import MemoryBank
from model.moco import MoCo, QueryEncoder

BLOCKS = " ▁▂▃▄▅▆▇█"
LEAST_ROWS = 2  # of which one can say how far apart they are


class HealthWatch:
    """The figures of ``model/health.py`` for one run.

    Args:
        every_steps: between looks; 0: never.
        global_batch: pictures of all processes in a step.
        world: number of processes.
    """

    def __init__(self, every_steps: int, global_batch: int, world: int) -> None:
        self._every_steps = every_steps
        self._global_batch = global_batch
        self._world = world
        self._labels: RecentLabels | None = None
        self._found: dict[str, Any] | None = None

    @torch.no_grad()
    def look(
        self,
        step: int,
        pairs: Pairs,
        dictionary: Dictionary,
        sample_N: Any,
        labels: Iterable[int],
    ) -> None:
        """Look, if it is time; the figures stay on the device.

        Args:
            step: from 0; this one's keys are not in the dictionary yet.
            pairs: queries and keys of the step; the first pair is looked at.
            dictionary: that they are compared with.
            sample_N: numbers of the pictures.
            labels: of the pictures; -1 where there is none.
        """
        if not self._every_steps:
            return
        is_due = (step + 1) % self._every_steps == 0
        query_ND, key_ND = pairs[0]
        if isinstance(dictionary, KeyQueue):
            self._look_at_queue(step, pairs, dictionary.rows_KD, labels, is_due=is_due)
        elif isinstance(dictionary, MemoryBank):
            rows_SD = dictionary.rows_SD
            if is_due and step * self._global_batch >= len(rows_SD):  # no random ones are left
                own_N = torch.as_tensor(sample_N, dtype=torch.int64, device=rows_SD.device)
                self._found = measure(query_ND, rows_SD[own_N], some_rows(rows_SD, 1.0))
        elif is_due and len(key_ND) >= LEAST_ROWS:
            self._found = measure(query_ND, key_ND, None)

    def _look_at_queue(
        self, step: int, pairs: Pairs, rows_KD: Tensor, labels: Iterable[int], *, is_due: bool
    ) -> None:
        if self._labels is None:
            self._labels = RecentLabels(len(rows_KD) // self._world)
        age = key_age(step, self._global_batch * len(pairs), len(rows_KD))
        if is_due and age.filled * len(rows_KD) >= LEAST_ROWS:
            share = self._labels.false_negative_share(labels)
            self._found = {
                **measure(*pairs[0], some_rows(rows_KD, age.filled)),
                "key_age_steps": age.mean_steps,
                "oldest_key_steps": age.oldest_steps,
                "queue_filled_share": age.filled,
                **({} if share is None else {"false_negative_share": share}),
            }
        for _ in pairs:
            self._labels.push(labels)

    @torch.no_grad()
    def read(self, moco: QueryEncoder) -> dict[str, Any] | None:
        """What the last look found, as plain numbers and lists; None if there was none since."""
        found, self._found = self._found, None
        if found is None:
            return None
        if isinstance(moco, MoCo):
            query, key = moco.encoder_q.parameters(), moco.encoder_k.parameters()
            found["encoder_distance"] = encoder_distance(query, key)
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found.items()}


def describe(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a look for people: names and values."""
    rows = [
        ("keys span", f"{values['effective_rank']:.1f} of {values['highest_rank']} dimensions"),
        ("uniformity", f"{values['uniformity']:.2f}"),
        ("own key", f"{values['positive_similarity']:.2f} {bars(values['positive_counts'])}"),
        ("other keys", f"{values['negative_similarity']:.2f} {bars(values['negative_counts'])}"),
    ]
    if "key_age_steps" in values:
        oldest = f"{values['key_age_steps']:.1f} steps (oldest {values['oldest_key_steps']:.0f})"
        rows.append(("age of keys", oldest))
    if "encoder_distance" in values:
        rows.append(("encoders apart", f"{values['encoder_distance']:.2%}"))
    if "false_negative_share" in values:
        rows.append(("false negatives", f"{values['false_negative_share']:.1%}"))
    return rows


def bars(counts: list[float]) -> str:
    """A histogram from -1 to 1 in half as many characters as bins; the highest bin is full."""
    pairs = [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    most = max(pairs) or 1
    return f"-1│{''.join(BLOCKS[math.ceil((len(BLOCKS) - 1) * n / most)] for n in pairs)}│1"
