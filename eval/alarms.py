"""What goes wrong with a run, in plain words, from the figures that it logs anyway.

An alarm is raised once and again only after its cause had gone. It never ends a run.
"""

import math
from dataclasses import dataclass
from typing import Any

PATIENCE = 3  # looks in a row: one may be a bad batch
# Effective rank of the keys over their dimensions, and similarity of different pictures. Of 128 the
# demo has rank 93 at its start, 47 at its end; with 4 times its learning rate 5, with a similarity
# of 0.73. Runs of CIFAR-10 learnt with a rank of 8 while that was below 0.2 (DESIGN.md).
COLLAPSED_SHARE, NARROW_SIMILARITY = 0.1, 0.5
COLLAPSED_RANK = 1.5
COLLAPSED_SIMILARITY = 0.98
SETTLED_STEPS = 1000  # of an epoch that is longer
CHANCE_MARGIN = 0.01  # of log(K + 1)
LEAK_ACCURACY = 0.9
KNN_STEP = 0.01  # a change of the kNN score that counts


@dataclass(frozen=True)
class Alarm:
    """A name for the log, and one line for people."""

    name: str
    text: str


class Alarms:
    """Follows one run.

    Args:
        chance_loss: of equal similarities, log(K + 1).
        queue: K; 0 if there is no queue.
        samples: pictures of the data set.
        settled_step: before it the loss climbs and embeddings are near-identical in healthy runs
            too, so nothing is judged.
    """

    def __init__(self, chance_loss: float, queue: int, samples: int, settled_step: int) -> None:
        self.chance_loss = chance_loss
        self._queue = queue
        self._samples = samples
        self._settled_step = settled_step
        self._in_a_row: dict[str, int] = {}
        self._raised: set[str] = set()
        self._knn: list[tuple[float, float]] = []

    def start(self) -> list[Alarm]:
        """What can be said before the first step."""
        text = (
            f"the queue of {self._queue} keys is longer than the data, {self._samples} pictures: "
            "every picture is its own negative; use a --moco.queue of a quarter of the pictures"
        )
        return self._raise_if("long queue", self._queue >= self._samples, text, patience=1)

    def look(self, step: int, values: dict[str, Any]) -> list[Alarm]:
        """After a look at the dictionary.

        Args:
            step: steps done.
            values: ``loss``, and what ``HealthWatch.read`` gives.
        """
        if step < self._settled_step:
            return []
        rank, most = values["effective_rank"], values["highest_rank"]
        alike = values["negative_similarity"]
        is_narrow = rank < COLLAPSED_SHARE * most and alike > NARROW_SIMILARITY
        collapse = self._raise_if(
            "collapse",
            rank < COLLAPSED_RANK or alike > COLLAPSED_SIMILARITY or is_narrow,
            f"collapse: the embeddings of all pictures span {rank:.1f} of {most} dimensions, the "
            f"similarity of different pictures is {alike:.2f}; start again "
            "with a lower --optimiser.lr or a --moco.momentum nearer to 1",
        )
        stuck = self._raise_if(
            "stuck at chance",
            values["loss"] > self.chance_loss * (1 - CHANCE_MARGIN),
            f"the loss {values['loss']:.3f} is that of guessing, log(K + 1) = "
            f"{self.chance_loss:.3f}, since {PATIENCE} looks: nothing is learnt; lower "
            "--optimiser.lr, or see whether the two views of a picture still show the same thing "
            "(pipeline/show_views.py)",
        )
        return collapse or stuck

    def knn(self, pretext_accuracy: float, top1: float) -> list[Alarm]:
        """After a kNN score; both in [0, 1].

        Source of the rule: appendix A.9 of https://arxiv.org/abs/1911.05722, where without
        shuffling the pretext accuracy soon passes 99.9 % while the kNN score falls. A leak that
        raises the pretext accuracy and leaves the kNN score as it is cannot be told from a run
        without one here: ``eval/run_check.py`` says at the start where the settings allow a leak.
        """
        self._knn.append((pretext_accuracy, top1))
        scores = [score for _, score in self._knn]
        last = scores[-PATIENCE:]
        has_fallen = max(last) < max(scores) - KNN_STEP
        never_rose = len(scores) > PATIENCE and max(last) < scores[0] + KNN_STEP
        best_accuracy = self._knn[scores.index(max(scores))][0]
        leaks = (
            len(scores) > PATIENCE
            and pretext_accuracy > max(LEAK_ACCURACY, best_accuracy - KNN_STEP)
            and (has_fallen or never_rose)
        )
        text = (
            f"pretext accuracy {pretext_accuracy:.1%} runs ahead of kNN ({scores[0]:.1%} first, "
            f"{max(scores):.1%} best, {top1:.1%} now): batch norm may tell the encoder which key is"
            " its own; use --moco.batch-norm shuffle and several groups"
        )
        return self._raise_if("batch-norm leak", leaks, text, patience=1)

    def _raise_if(
        self, name: str, is_wrong: bool, text: str, patience: int = PATIENCE
    ) -> list[Alarm]:
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if is_wrong else 0
        if not is_wrong:
            self._raised.discard(name)
        if self._in_a_row[name] < patience or name in self._raised:
            return []
        self._raised.add(name)
        return [Alarm(name, text)]


def settled_step(queue: int, keys_per_step: int, steps_per_epoch: int) -> int:
    """The step from which a run is judged: the queue filled twice, and an epoch over."""
    return max(2 * math.ceil(queue / keys_per_step), min(steps_per_epoch, SETTLED_STEPS))
