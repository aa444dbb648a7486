"""What ``train.py`` costs beside its arithmetic: its loop against a bare one.

    python tests/bench/overhead.py

Both sides train the network of the recipe ``demo`` (10-layer ResNet at 32 px, batch 64, K 512) on
tensors that lie in memory. ``train.train`` runs as it is: accelerate, guard, watchdog, meter,
agreement, health, a report every 10 steps to display, log and TensorBoard. Only its loader is
replaced by one that hands out the tensors, since data is another matter (``two_views.py``), and it
saves at its end only (``save_pause.py``). The bare loop is forward, loss, backward and SGD step.

The sides take turns every 50 steps within one run, so that whatever else the machine does meets
both; each turn has five reports and one look at the dictionary. Prints a JSON line with ``ratio``,
images/s of train.py over those of the bare loop: the median over the turns, its 95 % interval by
bootstrap, and the turns' quartiles.
"""

import dataclasses
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import train
from eval.recipes import RECIPES
from eval.tracking import start_trackers
from model.mechanism import make_dictionary
from model.moco import MoCo
from model.optimiser import make_optimiser
from model.run_state import RunState
from model.saving import Saver
from model.step_guard import StepGuard
from pipeline.loader import PairBatch
from pipeline.loader_meter import LoaderFigures
from pipeline.order import Order

TURNS, TURN_STEPS, WARM_UP_TURNS = 14, 50, 1  # a turn has a look at the dictionary's health
BATCHES = 4


def pieces(config: Any) -> tuple[Any, Any, Any]:
    """Encoders, dictionary and optimiser as a run makes them."""
    torch.manual_seed(config.seed)
    moco = MoCo(config.encoder, config.moco, config.batch, config.seed, config.data.image_px)
    dictionary = make_dictionary(config.moco, config.encoder.dim, 4096, config.seed)
    return moco, dictionary, make_optimiser(config.optimiser, moco.parameters())


class TurnsLoader:
    """Hands out resident batches, and lets the bare loop run between turns of train.py's."""

    def __init__(self, config: Any) -> None:
        views = torch.randn(2, BATCHES, config.batch, 3, 32, 32)
        samples_N = np.arange(config.batch)
        self._batches = [
            PairBatch(views[0, n], views[1, n], 0, samples_N, samples_N % 10, 0)
            for n in range(BATCHES)
        ]
        self._temperature = config.moco.temperature
        self._bare = pieces(config)
        self._step = 0
        self._began = 0.0
        self.times_s: list[tuple[float, float]] = []
        self.order = Order(np.array([4096]), config.batch, config.seed, 8, 512)
        manifest = SimpleNamespace(sha256="resident")
        self.store = SimpleNamespace(manifest=manifest, is_remote=False)
        self.quarantine = SimpleNamespace(bad=0)
        self.figures = LoaderFigures

    def __next__(self) -> PairBatch:
        now = time.perf_counter()
        if self._step % TURN_STEPS == 0:
            own_s = now - self._began
            bare_s = self._bare_turn()
            if self._step:
                self.times_s.append((own_s, bare_s))
            self._began = time.perf_counter()
        batch = dataclasses.replace(self._batches[self._step % BATCHES], step=self._step)
        self._step += 1
        return batch

    def _bare_turn(self) -> float:
        moco, dictionary, optimizer = self._bare
        began = time.perf_counter()
        for step in range(TURN_STEPS):
            batch = self._batches[step % BATCHES]
            pairs = moco(batch.query_N3HW, batch.key_N3HW, step)
            loss, _ = dictionary.contrast(pairs, self._temperature, batch.sample_N, step)
            loss.backward()
            dictionary.settle()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - began


def main() -> None:
    """Train, and print what came out."""
    steps = (TURNS + WARM_UP_TURNS) * TURN_STEPS + 1
    config = dataclasses.replace(RECIPES["demo"], steps=steps, save_every=10 * steps)
    with tempfile.TemporaryDirectory() as name:
        accelerator = Accelerator(cpu=True)
        loader = TurnsLoader(config)
        moco, dictionary, optimizer = pieces(config)
        wrapped = accelerator.prepare(moco)
        state = RunState(moco, dictionary, optimizer, None)
        saver = Saver(state, Path(name), keep=2, minutes=0, failed=print)
        run = train.Run(
            *(config, Path(name), accelerator, loader, wrapped, dictionary, optimizer, saver),
            *(train.watch_of(config, accelerator), StepGuard(moco, None)),
        )  # type: ignore[call-arg]
        console = Console(file=io.StringIO())
        with start_trackers(config, Path(name), 0, console, is_main=True) as tracking:
            train.train(run, tracking, first_step=0, total_steps=steps, console=console)
        accelerator.end_training()
    times = np.array(loader.times_s[WARM_UP_TURNS:])
    ratios = times[:, 1] / times[:, 0]
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    line = {
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "turns": len(ratios),
        "images_per_second": round(config.batch * TURN_STEPS / float(np.median(times[:, 0]))),
        "bare_images_per_second": round(config.batch * TURN_STEPS / float(np.median(times[:, 1]))),
    }
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
