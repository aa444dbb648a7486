"""What ``train.py`` costs beside its arithmetic: its loop against a bare one.

    python tests/bench/overhead.py

Both sides train on tensors that lie in memory. On a CPU: the network of the recipe ``demo``
(10-layer ResNet at 32 px, batch 64, K 512) and, as what is beside the arithmetic does not grow with
it, a ResNet-18 at 64 px with steps several times as long. On a GPU: the recipe ``moco-v2`` as it
is, in bfloat16 and channels last. ``train.train`` runs as it is: accelerate, guard,
watchdog, meter, agreement, health, a report every 10 steps to display, log and TensorBoard. Only
its loader is replaced by one that hands out the tensors, since data is another matter
(``two_views.py``), and it saves at its end only (``save_pause.py``). The bare loop is forward,
loss, backward and the optimiser's step.

The sides take turns within one run, so that whatever else the machine does meets both; each turn
has a look at the dictionary. A turn of train.py's is compared with the mean of the bare turns
before and after it. Prints a JSON line for each network with ``ratio``, images/s of train.py over
those of the bare loop: the median over the turns, its 95 % interval by bootstrap, and the turns'
quartiles.
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
from eval.run_config import TrainConfig
from eval.tracking import start_trackers
from model.encoder import EncoderConfig
from model.mechanism import make_dictionary
from model.moco import MoCo
from model.optimiser import make_optimiser
from model.run_state import RunState
from model.saving import Saver
from model.step_guard import StepGuard
from model.step_memory import AUTOCAST
from pipeline.loader import PairBatch
from pipeline.loader_meter import LoaderFigures
from pipeline.order import Order

BATCHES = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, and how often and for how many steps the sides take turns."""

    network: str
    config: TrainConfig
    turns: int
    turn_steps: int


DEMO = RECIPES["demo"]
ON_GPU = (
    Setting(
        "moco-v2",
        dataclasses.replace(RECIPES["moco-v2"], precision="bf16", channels_last=True),
        turns=10,
        turn_steps=20,
    ),
)
ON_CPU = (
    Setting(
        "resnet18, 64 px",
        dataclasses.replace(
            DEMO,
            batch=32,
            encoder=EncoderConfig(backbone="resnet18"),
            data=dataclasses.replace(DEMO.data, image_px=64),
            health_every=1,  # so that each of these shorter turns has a look too
        ),
        turns=10,
        turn_steps=10,
    ),
    Setting("demo", DEMO, turns=20, turn_steps=50),
)


def pieces(config: Any) -> tuple[Any, Any, Any]:
    """Encoders, dictionary and optimiser as a run makes them."""
    torch.manual_seed(config.seed)
    moco = MoCo(config.encoder, config.moco, config.batch, config.seed, config.data.image_px)
    dictionary = make_dictionary(config.moco, config.encoder.dim, 4096, config.seed)
    moco.to(DEVICE, memory_format=train.layout_of(config))
    optimizer = make_optimiser(config.optimiser, moco.parameters())
    return moco, dictionary.to(DEVICE), optimizer


def seconds_now() -> float:
    """A clock that what the device was given is part of."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class TurnsLoader:
    """Hands out resident batches, and lets the bare loop run between turns of train.py's."""

    def __init__(self, config: TrainConfig, turn_steps: int) -> None:
        side = config.data.image_px
        half = DEVICE.type == "cuda" and config.precision != "no"
        views = [
            torch.randn(config.batch, 3, side, side)
            .to(DEVICE, torch.float16 if half else torch.float32)
            .to(memory_format=train.layout_of(config))
            for _ in range(2 * BATCHES)
        ]
        samples_N = np.arange(config.batch)
        self._batches = [
            PairBatch(views[2 * n], views[2 * n + 1], 0, samples_N, samples_N % 10, 0)
            for n in range(BATCHES)
        ]
        self._temperature = config.moco.temperature
        self._autocast = torch.autocast(
            DEVICE.type, AUTOCAST.get(config.precision), enabled=config.precision != "no"
        )
        self._bare = pieces(config)
        self._turn_steps = turn_steps
        self._step = 0
        self._began = 0.0
        self.own_s: list[float] = []
        self.bare_s: list[float] = []
        self.order = Order(np.array([4096]), config.batch, config.seed, 8, 512)
        manifest = SimpleNamespace(sha256="resident")
        self.store = SimpleNamespace(manifest=manifest, is_remote=False)
        self.quarantine = SimpleNamespace(bad=0)
        self.figures = LoaderFigures

    def __next__(self) -> PairBatch:
        if self._step % self._turn_steps == 0:
            if self._step:
                self.own_s.append(seconds_now() - self._began)
            self.bare_s.append(self._bare_turn())
            self._began = seconds_now()
        batch = dataclasses.replace(self._batches[self._step % BATCHES], step=self._step)
        self._step += 1
        return batch

    def _bare_turn(self) -> float:
        moco, dictionary, optimizer = self._bare
        began = seconds_now()
        for step in range(self._turn_steps):
            batch = self._batches[step % BATCHES]
            with self._autocast:
                pairs = moco(batch.query_N3HW, batch.key_N3HW, step)
            loss, _ = dictionary.contrast(pairs, self._temperature, batch.sample_N, step)
            loss.backward()
            dictionary.settle()
            optimizer.step()
            optimizer.zero_grad()
        return seconds_now() - began


def run_turns(setting: Setting, folder: Path) -> TurnsLoader:
    """Train in turns; the loader knows the times."""
    steps = setting.turns * setting.turn_steps + 1
    config = dataclasses.replace(setting.config, steps=steps, save_every=10 * steps)
    accelerator = Accelerator(cpu=DEVICE.type == "cpu", mixed_precision=config.precision)
    loader = TurnsLoader(config, setting.turn_steps)
    moco, dictionary, optimizer = pieces(config)
    wrapped = accelerator.prepare(moco)
    state = RunState(moco, dictionary, optimizer, None)
    saver = Saver(state, folder, keep=2, minutes=0, failed=print)
    run = train.Run(
        *(config, folder, accelerator, loader, wrapped, dictionary, optimizer, saver),
        *(train.watch_of(config, accelerator), StepGuard(moco, None)),
    )  # type: ignore[call-arg]
    console = Console(file=io.StringIO())
    with start_trackers(config, folder, 0, console, is_main=True) as tracking:
        train.train(run, tracking, first_step=0, total_steps=steps, console=console)
    accelerator.end_training()
    return loader


def measure(setting: Setting) -> dict[str, Any]:
    """The figures of one network."""
    with tempfile.TemporaryDirectory() as name:
        loader = run_turns(setting, Path(name))
    own_s = np.array(loader.own_s[1:])  # the first ones warm up
    bare_s = np.array(loader.bare_s[1:])
    ratios = (bare_s[:-1] + bare_s[1:]) / 2 / own_s
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    images = setting.config.batch * setting.turn_steps
    return {
        "network": setting.network,
        "ratio": round(float(np.median(ratios)), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "turns": len(ratios),
        "images_per_second": round(images / float(np.median(own_s))),
        "bare_images_per_second": round(images / float(np.median(bare_s))),
        "step_ms": round(float(np.median(own_s)) / setting.turn_steps * 1e3, 1),
    }


def main() -> None:
    """Train, and print what came out."""
    for setting in ON_CPU if DEVICE.type == "cpu" else ON_GPU:
        sys.stdout.write(json.dumps(measure(setting)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
