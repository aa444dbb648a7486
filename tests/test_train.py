"""The program: recipes, Algorithm 1, resume, interruption, wrong input, two processes."""

import contextlib
import copy
import dataclasses
import errno
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
import webdataset
from accelerate import Accelerator
from rich.console import Console

import train
from eval.health_watch import HealthWatch
from eval.judged import checkpoint_encoder
from eval.knn import KnnProtocol, knn_of_shards
from eval.recipes import RECIPES
from eval.run_arguments import parse_arguments
from eval.weights_source import open_checkpoint
from model import checkpoint
from model.checkpoint import load_checkpoint
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.optimiser import make_optimiser
from model.step_guard import StepGuard
from model.stopping import RESTART_CODE, STOPPING
from pipeline import check_shards
from pipeline.loader import PairBatch
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
TINY = ["demo", "--encoder.backbone", "test_resnet", "--encoder.stem", "imagenet",
        "--encoder.dim", "16", "--moco.queue", "20", "--batch", "8", "--data.threads", "1",
        "--log-every", "1", "--optimiser.lr", "0.01"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread_of_the_cpu():
    """Sums of floats are bitwise the same only with as many threads in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


def command(*words):
    """What ``python train.py WORDS`` does, in this process: its exit code, output and errors."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *map(str, words)])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def trained(output, shards, *words):
    """The folder of a run that went to its end."""
    done = command(*TINY, "--data.shards", shards, "--output", output, *words)
    assert (done.code, done.err) == (0, "")
    return output


def logged(run, *names):
    lines = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return [[line[name] for name in ("step", *names)] for line in lines if names[0] in line]


def assert_same_checkpoint(run, other, step):
    first, second = (load_checkpoint(folder / f"step-{step:09d}") for folder in (run, other))
    torch.testing.assert_close(first.tensors, second.tensors, rtol=0, atol=0)
    assert first.state["queue_place"] == second.state["queue_place"]
    assert first.state["optimiser"] == second.state["optimiser"]


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory, shard_set):
    """A run of six steps, longer than an epoch of five, with checkpoints after 3 and 6."""
    output = tmp_path_factory.mktemp("six") / "run"
    return trained(output, shard_set, "--steps", "6", "--save-every", "3")


# Algorithm 1 -------------------------------------------------------------------------------------


def algorithm_1(moco, queue_KD, pairs, config):
    """Algorithm 1 of the paper, line by line, in float64; yields loss, queue and f_k."""
    f_q, f_k = (copy.deepcopy(encoder).double() for encoder in (moco.encoder_q, moco.encoder_k))
    queue_KD, m, t = queue_KD.double(), config.moco.momentum, config.moco.temperature
    velocity = [torch.zeros_like(parameter) for parameter in f_q.parameters()]
    for x_q, x_k in pairs:
        q_ND = F.normalize(f_q.head(f_q.backbone(x_q.double())), dim=1)
        with torch.no_grad():
            k_ND = F.normalize(f_k.head(f_k.backbone(x_k.double())), dim=1)
        l_pos = torch.einsum("nd,nd->n", q_ND, k_ND)[:, None]
        l_neg = torch.einsum("nd,kd->nk", q_ND, queue_KD)
        logits = torch.cat([l_pos, l_neg], dim=1)
        loss = F.cross_entropy(logits / t, torch.zeros(len(logits), dtype=torch.long))
        gradients = torch.autograd.grad(loss, list(f_q.parameters()))
        with torch.no_grad():
            for p, v, g in zip(f_q.parameters(), velocity, gradients, strict=True):
                v.mul_(config.optimiser.momentum).add_(g + config.optimiser.weight_decay * p)
                p -= config.optimiser.lr * v
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                p_k.copy_(m * p_k + (1 - m) * p_q)
        queue_KD = torch.cat([queue_KD, k_ND])[k_ND.shape[0] :]
        yield loss.item(), queue_KD, dict(f_k.named_parameters())


NO_LOOKS = HealthWatch(0, 1, 1)


@pytest.fixture
def tiny_run(tmp_path):
    """A ``train.Run`` without a loader.

    Its batch norm is fixed: with the statistics of a few pictures rounding grows tenfold a step.
    """
    config = dataclasses.replace(
        RECIPES["demo"],
        encoder=EncoderConfig(backbone="test_resnet", dim=16),
        moco=MoCoConfig(queue=24, momentum=0.9, temperature=0.2, batch_norm="none"),
        optimiser=dataclasses.replace(RECIPES["demo"].optimiser, lr=0.03),
        batch=16,
    )
    torch.manual_seed(0)
    moco, queue = MoCo(config.encoder, config.moco, 16, seed=0), KeyQueue(24, 16, seed=0)
    moco.eval()
    accelerator = Accelerator()
    wrapped = accelerator.prepare(moco)
    optimizer = make_optimiser(config.optimiser, moco.parameters())
    rest = (None, NO_LOOKS, StepGuard(moco, None))
    return train.Run(config, tmp_path, accelerator, None, wrapped, queue, optimizer, *rest)


def pairs_of_views(steps):
    """Random pictures, each in two views that are alike."""
    generator = torch.Generator().manual_seed(0)
    pictures, noise = torch.randn(2, steps, 16, 3, 32, 32, generator=generator)
    return torch.stack([pictures, pictures + 0.5 * noise], dim=1)


def test_twenty_steps_are_algorithm_1_of_the_paper(tiny_run):
    queue, keys = tiny_run.dictionary, tiny_run.moco.encoder_k
    pairs = pairs_of_views(20)
    reference = algorithm_1(tiny_run.moco, queue.rows_KD.clone(), pairs, tiny_run.config)
    for step, (expected_loss, expected_queue_KD, expected) in enumerate(reference):
        batch = PairBatch(*pairs[step], step, None, None, 0)
        loss, _ = train.train_step(tiny_run, batch)
        assert loss.item() == pytest.approx(expected_loss, abs=1e-3)
        oldest_first_KD = torch.roll(queue.rows_KD, -queue.place, dims=0)
        torch.testing.assert_close(oldest_first_KD.double(), expected_queue_KD, rtol=0, atol=1e-3)
        # Here a key encoder moves at the start of the next step.
        followed = copy.deepcopy(tiny_run.moco)
        followed.move_key_encoder()
        for name, parameter in followed.encoder_k.named_parameters():
            difference = (parameter.double() - expected[name]).norm()
            assert difference <= 1e-3 * expected[name].norm() + 1e-4, name
    assert not any(parameter.requires_grad for parameter in keys.parameters())


def test_a_positive_is_never_among_its_negatives(tiny_run):
    """Two equal views and keys that are all far away: unless it is in the queue, a key is found."""
    view = pairs_of_views(1)[0, 0]
    query_ND = tiny_run.moco.encoder_q(view).detach()
    tiny_run.dictionary.rows_KD.copy_(-query_ND[[0] * 24])
    batch = PairBatch(view, view, 0, None, None, 0)
    loss, accuracy = train.train_step(tiny_run, batch)
    similarity_N = query_ND @ -query_ND[0]
    expected = (24 * ((similarity_N - 1) / 0.2).exp()).log1p().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert accuracy == 1.0
    assert tiny_run.dictionary.place == 16


# Resume ------------------------------------------------------------------------------------------


def test_six_steps_are_three_and_a_resume_and_three_bit_by_bit(six_steps, shard_set, tmp_path):
    killed = shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(killed / "step-000000006")  # killed after six steps, before they were saved
    trained(killed, shard_set, "--steps", "6", "--save-every", "3", "--resume")
    assert_same_checkpoint(killed, six_steps, 6)
    names = ("loss", "pretext_accuracy", "learning_rate", "images_seen")
    assert logged(killed, *names) == logged(six_steps, *names)
    assert logged(killed, "images_seen")[-1] == [6, 48.0]
    saved = load_checkpoint(killed / "step-000000003").state["totals"]
    assert saved["images"] == 24
    seconds = [seconds for _, seconds in logged(killed, "training_seconds")]
    assert seconds == sorted(seconds) and seconds[2] < saved["training_s"] < seconds[3]


def test_a_run_goes_on_in_micro_batches_and_says_so(six_steps, shard_set, tmp_path):
    words = ("--steps", "6", "--resume", six_steps / "step-000000003", "--micro-batch", "3")
    given = ("--data.shards", shard_set, "--output", tmp_path / "run")
    done = command(*TINY, *given, *words)
    assert (done.code, done.err) == (0, "")
    assert "each process cuts its 8 pictures of a step into 4 micro-batches of 2" in done.out
    whole = dict(logged(six_steps, "loss"))
    for step, loss in logged(tmp_path / "run", "loss"):
        assert loss == pytest.approx(whole[step], abs=2e-3)


FORMS = {
    "memory bank": ["--moco.mechanism", "memory-bank"],
    "end-to-end": ["--moco.mechanism", "end-to-end"],
    "symmetric": ["--moco.symmetric"],
    "bfloat16, overlapping": ["--moco.queue-dtype", "bfloat16", "--moco.overlap-gather"],
    "batch, predictor, momentum to 1": [
        *("--moco.mechanism", "batch", "--moco.symmetric", "--moco.predictor", "--moco.loss-2t"),
        *("--moco.momentum-schedule", "cosine", "--moco.batch-norm", "sync"),
        *("--encoder.head", "v3", "--encoder.hidden", "24", "--optimiser.name", "lars"),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_mechanism_goes_on_bit_by_bit_after_a_resume(form, shard_set, tmp_path):
    words = (shard_set, *FORMS[form], "--steps", "6", "--save-every", "3")
    whole = trained(tmp_path / "whole", *words)
    killed = shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(killed / "step-000000006")
    trained(killed, *words, "--resume")
    first, second = (load_checkpoint(run / "step-000000006") for run in (whole, killed))
    torch.testing.assert_close(first.tensors, second.tensors, rtol=0, atol=0)
    expected = {
        "memory bank": {"encoder_q", "memory_bank", "optimiser"},
        "end-to-end": {"encoder_q", "optimiser"},
        "symmetric": {"encoder_q", "encoder_k", "queue", "optimiser"},
        "bfloat16, overlapping": {"encoder_q", "encoder_k", "queue", "optimiser"},
        "batch, predictor, momentum to 1": {"encoder_q", "encoder_k", "predictor", "optimiser"},
    }
    assert set(first.tensors) == expected[form]
    losses = logged(whole, "loss", "pretext_accuracy")
    assert logged(killed, "loss", "pretext_accuracy") == losses
    assert len({loss for _, loss, _ in losses}) == 6


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("moco-v3-100", ["--encoder.backbone", "test_resnet"]),
        ("moco-v3-vit-s", ["--encoder.backbone", "test_vit", "--encoder.heads", "2"]),
    ],
)
def test_the_recipes_of_moco_v3_train_on_a_small_network(recipe, words, shard_set, tmp_path):
    small = ["--encoder.hidden", "32", "--encoder.dim", "16", "--batch", "8", "--precision", "no"]
    small += ["--data.image-px", "32", "--data.eval-resize-px", "32", "--data.threads", "1"]
    small += ["--steps", "4", "--log-every", "1", "--optimiser.warmup-epochs", "0.2"]
    output = tmp_path / "run"
    done = command(recipe, *words, *small, "--data.shards", shard_set, "--output", output)
    assert (done.code, done.err) == (0, "")
    assert "1 batch-norm groups of 8" in done.out
    rates = [rate for _, rate in logged(output, "learning_rate")]
    assert rates[0] == 0
    assert rates[1] > rates[2] > rates[3]


def test_channels_last_changes_how_views_and_weights_lie_and_not_what_is_learnt(
    six_steps, shard_set, tmp_path
):
    run = trained(tmp_path / "run", shard_set, "--steps", "6", "--channels-last")
    # Of the first step alone: with batch norm over two pictures rounding grows tenfold a step.
    first, plain = logged(run, "loss")[0], logged(six_steps, "loss")[0]
    assert first == pytest.approx(plain, rel=1e-3)
    torch.manual_seed(0)
    moco = MoCo(EncoderConfig(backbone="test_resnet", dim=8), MoCoConfig(), 16, seed=0).double()
    twin = copy.deepcopy(moco)
    train.prepare_encoders(moco, dataclasses.replace(RECIPES["demo"], channels_last=True), None)
    weight = moco.encoder_k.backbone.layer2[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    views = pairs_of_views(1)[0].double()
    for network, layout in ((moco, torch.channels_last), (twin, torch.contiguous_format)):
        network(*(view.to(memory_format=layout) for view in views), 0)[0][0].sum().backward()
    for ours, theirs in zip(moco.encoder_q.parameters(), twin.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_half_precision_without_a_gpu_is_one_line(shard_set, tmp_path):
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--precision", "fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        done = command(*TINY, *words)
    assert done.code == 2
    assert "--precision fp16 needs a GPU" in done.err
    assert not (tmp_path / "run").exists()


def test_the_momentum_of_a_cosine_schedule_goes_to_one(tiny_run):
    moco = dataclasses.replace(tiny_run.config.moco, momentum_schedule="cosine")
    run = dataclasses.replace(tiny_run, config=dataclasses.replace(tiny_run.config, moco=moco))
    found = []
    for step in (0, 5, 10):
        train.set_momentum(run, step, total_steps=10)
        found.append(run.moco.momentum)
    assert found == pytest.approx([0.9, 0.95, 1.0])


def test_a_memory_bank_that_is_all_in_the_batch_is_refused(shard_set, tmp_path):
    words = ("--moco.mechanism", "memory-bank", "--batch", "40", "--data.lanes", "1")
    done = command(*TINY, "--data.shards", shard_set, "--output", tmp_path / "run", *words)
    assert done.code == 2
    assert "a memory bank needs more pictures than a batch" in done.err
    assert not (tmp_path / "run").exists()


def test_a_resume_does_not_log_the_same_bad_samples_again(own_set, flip_bit, tmp_path):
    for index in (0, 3, 7, 12):
        flip_bit(own_set, 1, index)
    words = ("--steps", "6", "--save-every", "3", "--data.max-bad-share", "1")
    run = tmp_path / "run"
    done = command(*TINY, "--data.shards", own_set, "--output", run, *words)
    assert re.search(r"note: .* \d+ samples that could not be used; see \S+-0\.jsonl", done.out)
    (run / "quarantine-3.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    logs = [(run / "quarantine-0.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "step-000000006")
    trained(run, own_set, *words, "--resume")
    logs.append((run / "quarantine-0.jsonl").read_text().splitlines())
    # The reader is ahead of the last step, now more and now less.
    logs = [sorted(line for line in log if json.loads(line)["step"] < 6) for log in logs]
    assert logs[0] == logs[1] and len(logs[0]) == len(set(logs[0])) >= 4
    # Of a rank that is no more.
    assert (run / "quarantine-3.jsonl").read_text() == '{"step": 2}\n'


def test_a_damaged_newest_checkpoint_costs_one_interval_and_is_said(six_steps, shard_set, tmp_path):
    run = shutil.copytree(six_steps, tmp_path / "run")
    (run / "step-000000006" / "queue.safetensors").write_bytes(b"")
    done = command(*TINY, "--data.shards", shard_set, "--output", run, "--steps", "6", "--resume")
    assert done.code == 0
    assert "queue.safetensors is damaged" in done.out
    assert "resumed after step 3" in done.out
    assert_same_checkpoint(run, six_steps, 6)


def test_an_interrupted_run_goes_on_to_the_same_end(shard_set, tmp_path):
    words = [*TINY, "--data.shards", str(shard_set), "--steps", "60", "--output"]
    process = subprocess.Popen(
        [*warm_python(), ROOT / "train.py", *words, "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = next(line for line in process.stdout if line.startswith("step 2/60"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err) == (128 + signal.SIGINT, "")
    (folder,) = (tmp_path / "run").glob("step-*")
    step = load_checkpoint(folder).step
    assert 2 <= step < 60, seen
    assert f"stopped by SIGINT after step {step} of 60 and saved" in out
    done = command(*words, tmp_path / "run", "--resume")
    assert f"resumed after step {step} " in done.out
    whole = trained(tmp_path / "whole", shard_set, "--steps", "60")
    assert_same_checkpoint(tmp_path / "run", whole, 60)
    assert logged(tmp_path / "run", "loss") == logged(whole, "loss")


def test_a_save_that_fails_is_said_and_the_run_goes_on(six_steps, shard_set, tmp_path, monkeypatch):
    write = checkpoint.write_tensors

    def no_room_at_step_2(path, named):
        if "000000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, named)

    monkeypatch.setattr(checkpoint, "write_tensors", no_room_at_step_2)
    monkeypatch.setattr("model.saving.TELL_AFTER_S", 0.0)
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "6")
    done = command(*TINY, *words, "--save-every", "1", "--keep", "9")
    assert (done.code, done.err) == (0, "")
    assert "the checkpoint of step 2 could not be written" in done.out
    assert "the disk is full" in done.out
    assert "step 1: saves have waited 0 s so far" in done.out
    left = [step for step, _ in checkpoint.checkpoint_folders(tmp_path / "run")]
    assert left == [1, 3, 4, 5, 6]
    assert_same_checkpoint(tmp_path / "run", six_steps, 6)


def test_a_last_save_that_fails_is_the_runs_error(shard_set, tmp_path, monkeypatch):
    def no_room(path, _):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "write_tensors", no_room)
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "1")
    done = command(*TINY, *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "the disk is full" in done.err


def test_minutes_ask_for_a_checkpoint_too(six_steps, shard_set, tmp_path):
    words = ("--steps", "6", "--save-every", "100", "--save-minutes", "1e-6", "--keep", "9")
    run = trained(tmp_path / "run", shard_set, *words)
    assert len(checkpoint.checkpoint_folders(run)) > 1
    assert_same_checkpoint(run, six_steps, 6)


def test_a_run_goes_on_in_another_folder_from_a_checkpoint_that_is_named(
    six_steps, shard_set, tmp_path
):
    run = trained(
        tmp_path / "run", shard_set, "--steps", "6", "--resume", six_steps / "step-000000003"
    )
    assert_same_checkpoint(run, six_steps, 6)
    assert logged(run, "loss") == logged(six_steps, "loss")[3:]
    other = trained(tmp_path / "other", shard_set, "--steps", "7", "--resume", six_steps)
    assert [step for step, _ in logged(other, "loss")] == [7]


def test_a_resume_from_before_the_newest_checkpoint_needs_another_folder(six_steps, shard_set):
    before = snapshot(six_steps)
    words = ("--steps", "6", "--resume", six_steps / "step-000000003")
    done = command(*TINY, "--data.shards", shard_set, "--output", six_steps, *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "is older than" in done.err and "give another --output" in done.err
    assert snapshot(six_steps) == before


def test_auto_starts_a_run_and_goes_on_with_one(six_steps, shard_set, tmp_path):
    words = ("--steps", "6", "--save-every", "3", "--resume", "auto")
    run = trained(tmp_path / "run", shard_set, *words)
    assert_same_checkpoint(run, six_steps, 6)
    shutil.rmtree(run / "step-000000006")
    again = command(*TINY, "--data.shards", shard_set, "--output", run, *words)
    assert "resumed after step 3" in again.out
    assert_same_checkpoint(run, six_steps, 6)


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
@pytest.mark.parametrize("resume", [(), ("--resume", "from")], ids=["", "--resume PATH"])
def test_a_launcher_that_starts_a_run_again_goes_on_with_it(
    six_steps, shard_set, tmp_path, monkeypatch, count, resume
):
    run = shutil.copytree(six_steps, tmp_path / "run")
    shutil.rmtree(run / "step-000000006")
    words = (*TINY, "--data.shards", shard_set, "--output", run, "--steps", "6", *resume)
    monkeypatch.setenv(count, "0")
    assert command(*words).code == 2
    monkeypatch.setenv(count, "1")
    done = command(*words)
    assert (done.code, done.err) == (0, "")
    assert "resumed after step 3" in done.out


def test_a_launcher_may_start_a_run_again_that_had_not_begun(shard_set, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    trained(tmp_path / "run", shard_set, "--steps", "1")


def test_a_longer_run_may_be_asked_for_and_is_said(six_steps, shard_set, tmp_path):
    run = shutil.copytree(six_steps, tmp_path / "run")
    words = ("--data.shards", shard_set, "--output", run, "--steps", "8", "--resume")
    done = command(*TINY, *words)
    assert done.code == 0
    assert "note: steps is 8 and was 6; the schedule follows it" in done.out
    assert load_checkpoint(run / "step-000000008").step == 8


def test_the_settings_that_a_run_wrote_are_the_input_of_the_next(six_steps, tmp_path):
    done = command("--config", six_steps / "config.json", "--output", tmp_path / "next")
    assert (done.code, done.err) == (0, "")
    assert_same_checkpoint(tmp_path / "next", six_steps, 6)


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    (tmp_path / "some.json").write_text('{"batch": 12, "moco": {"queue": 5, "momentum": 0.5}}')
    words = ["demo", "--config", str(tmp_path / "some.json"), "--moco.queue", "7"]
    config = parse_arguments(words, "").run
    assert (config.batch, config.moco.queue, config.moco.momentum) == (12, 7, 0.5)
    assert config.moco.temperature == RECIPES["demo"].moco.temperature


def test_the_optimiser_has_the_rate_that_is_logged(six_steps):
    rates = dict(logged(six_steps, "learning_rate"))
    assert rates[5] == 0.01  # the first of two epochs
    assert rates[6] == pytest.approx(0.005)
    for step in (3, 6):
        state = load_checkpoint(six_steps / f"step-{step:09d}").state
        assert [group["lr"] for group in state["optimiser"]["groups"]] == [rates[step]]


# Weights to start from ---------------------------------------------------------------------------


def test_a_run_starts_from_the_backbone_of_another_projects_checkpoint(shard_set, tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{n}": t for n, t in theirs.items()}},
               tmp_path / "moco.pth")  # fmt: skip
    words = ("--encoder.weights", tmp_path / "moco.pth", "--optimiser.lr", "1e-9",
             "--optimiser.weight-decay", "0", "--steps", "1")  # fmt: skip
    run = trained(tmp_path / "run", shard_set, *words)
    found = load_checkpoint(run / "step-000000001")
    for encoder in ("encoder_q", "encoder_k"):
        for name, tensor in theirs.items():
            if "running" not in name and "tracked" not in name:
                torch.testing.assert_close(found.tensors[encoder][f"backbone.{name}"], tensor)
    trained(tmp_path / "next", shard_set, "--encoder.weights", run, "--steps", "1")
    (tmp_path / "moco.pth").unlink()  # a resumed run has its own
    command(*TINY, "--data.shards", shard_set, "--output", tmp_path / "run", *words)


def test_weights_that_do_not_fit_end_before_a_run_is_written(shard_set, tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "w.pth")
    done = command(*TINY, "--data.shards", shard_set, "--output", tmp_path / "run",
                   "--encoder.weights", tmp_path / "w.pth")  # fmt: skip
    assert done.code == 2
    assert "is not a whole test_resnet" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# What a run leaves and says ----------------------------------------------------------------------


def test_a_run_leaves_its_settings_log_curve_and_checkpoints(six_steps):
    left = {path.name for path in six_steps.iterdir()}
    steps = {"step-000000003", "step-000000006"}
    logs = {"config.json", "environment.json", "run.jsonl", "curve.png", "tensorboard", ".lock"}
    assert left == logs | steps
    assert [step for step, _ in logged(six_steps, "loss")] == [1, 2, 3, 4, 5, 6]
    assert not list(six_steps.rglob("*.part"))


def test_a_knn_score_during_the_run_changes_nothing_of_it(six_steps, shard_set, tmp_path):
    judged = ("--knn-train", shard_set, "--knn-test", shard_set, "--knn-every", "2")
    words = ("--data.shards", shard_set, "--steps", "6", "--save-every", "3", *judged)
    done = command(*TINY, *words, "--output", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    assert_same_checkpoint(tmp_path / "run", six_steps, 6)
    scores = logged(tmp_path / "run", "knn_top1")
    left_out = re.findall(r"step (\d): no kNN score, that of step \d", done.out)
    assert sorted([step for step, _ in scores] + [int(step) for step in left_out]) == [2, 4, 6]
    assert scores[-1][0] == 6 and all(0 <= score <= 1 for _, score in scores)
    # The last one is that of the checkpoint, by the program that judges it.
    found = checkpoint_encoder(open_checkpoint(tmp_path / "run", pytest.fail), "bicubic")
    result = knn_of_shards(found, shard_set, shard_set, KnnProtocol(), device=torch.device("cpu"))
    assert scores[-1][1] == result["top1"]


def test_the_untrained_encoder_of_an_evaluation_is_the_runs_own_at_step_0(shard_set, tmp_path):
    still = ("--optimiser.lr", "0", "--steps", "1", "--seed", "5")
    run = trained(tmp_path / "run", shard_set, *still)
    found = open_checkpoint(run, pytest.fail)
    judged = checkpoint_encoder(found, "bicubic", untrained=True)
    for name, parameter in judged.network.named_parameters():
        assert torch.equal(parameter, found.tensors["encoder_q"][f"backbone.{name}"]), name


def test_a_queue_that_is_long_for_the_data_is_noted(shard_set, tmp_path):
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "1")
    done = command(*TINY, *words)
    assert "the queue of 20 keys is longer than a quarter of the 40 pictures" in done.out
    assert "4 batch-norm groups of 2" in done.out
    assert "which key is its own" not in done.out


def test_a_run_that_diverges_ends_with_one_line(shard_set, tmp_path):
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "9")
    done = command(*TINY, *words, "--optimiser.lr", "1e30", "--max-skipped", "3")
    assert done.code == 2
    assert "no finite gradient in 3 steps in a row, 2 to 4" in done.err
    path = tmp_path / "run" / "skipped-0.jsonl"
    skipped = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in skipped] == [2, 3, 4]
    assert all(len(line["samples"]) == 8 for line in skipped)
    assert len(done.err.splitlines()) == 1
    assert "the run has diverged" in done.err
    assert "--optimiser.lr" in done.err


# Health of the dictionary ------------------------------------------------------------------------


def alarms_of(run):
    lines = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return [line["alarm"] for line in lines if "alarm" in line]


def test_a_run_logs_its_dictionary_on_reports_that_are_due(shard_set, tmp_path):
    run = trained(tmp_path / "run", shard_set, "--steps", "7", "--log-every", "1",
                  "--health-every", "2")  # fmt: skip
    found = logged(run, "effective_rank", "key_age_steps", "oldest_key_steps", "encoder_distance",
                   "negative_counts", "false_negative_share")  # fmt: skip
    assert [(line[0], line[2], line[3]) for line in found] == [(2, 1, 1), (4, 1.8, 3), (6, 1.8, 3)]
    assert [sum(line[5]) for line in found] == [8 * 8, 8 * 20, 8 * 20]  # queries x filled rows
    for _, rank, _, _, distance, _, share in found:
        assert 1 <= rank <= 16
        assert distance > 0
        assert 0.2 < share < 0.5  # three classes, as many pictures of each
    assert alarms_of(run) == []


def test_no_look_changes_what_is_trained(shard_set, tmp_path, six_steps):
    run = trained(tmp_path / "run", shard_set, "--steps", "6", "--save-every", "3",
                  "--health-every", "0")  # fmt: skip
    assert_same_checkpoint(run, six_steps, 6)
    assert not any("effective_rank" in line for line in (run / "run.jsonl").read_text().split())


def test_a_far_too_high_learning_rate_raises_the_alarm(shard_set, tmp_path):
    run = trained(tmp_path / "run", shard_set, "--steps", "40", "--optimiser.lr", "3",
                  "--health-every", "1", "--log-every", "2", "--moco.queue", "16")  # fmt: skip
    assert alarms_of(run)[0] == "collapse"


def test_a_queue_longer_than_the_data_raises_the_alarm(shard_set, tmp_path):
    run = trained(tmp_path / "run", shard_set, "--steps", "1", "--moco.queue", "64")
    assert alarms_of(run) == ["long queue"]


def test_numbers_that_follow_from_the_set_are_plain_ones_in_the_run(tmp_path, shard_set):
    small = ["small-data", *TINY[1:], "--data.image-px", "32", "--data.eval-resize-px", "32"]
    small.remove("--moco.queue")
    small.remove("20")
    words = [*small, "--data.shards", shard_set, "--output", tmp_path / "run"]
    done = command(*words, "--steps", "2")
    assert (done.code, done.err) == (0, "")
    assert "queue 8: chosen for 40 pictures in steps of 8" in done.out
    moco = json.loads((tmp_path / "run" / "config.json").read_text())["moco"]
    assert (moco["queue"], moco["momentum"]) == (8, 0.99)
    more = command(*words, "--steps", "4", "--resume")
    assert (more.code, more.err) == (0, "")
    rows = load_checkpoint(tmp_path / "run" / "step-000000004").tensors["queue"]["rows_KD"]
    assert len(rows) == 8


# The plan ----------------------------------------------------------------------------------------


def test_a_plan_knows_the_checkpoints_and_leaves_nothing(tmp_path, shard_set, six_steps):
    figures, output = tmp_path / "plan.json", tmp_path / "run"
    words = ["--steps", "6", "--output", output, "--plan", "--plan.json", figures]
    done = command(*TINY, "--data.shards", shard_set, *words)
    assert (done.code, done.err) == (0, "")
    assert "nothing was started" in done.out
    assert sorted(tmp_path.iterdir()) == [figures]
    planned = json.loads(figures.read_text())
    folder = six_steps / "step-000000006"
    tensors = load_checkpoint(folder).tensors.values()
    real = sum(t.numel() * t.element_size() for group in tensors for t in group.values())
    assert planned["storage"]["checkpoint"] == real
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    assert on_disk - real < 64 * 1024
    assert planned["length"]["steps"] == 6


# Wrong input -------------------------------------------------------------------------------------

WRONG = {
    "a misspelt recipe": (["moco-v22"], r"no recipe 'moco-v22'.*Did you mean moco-v2\?"),
    "no recipe": ([], "no recipe: the first word is one of moco-v1, .*moco-v2, .*cifar10, .*demo"),
    "no shards": ([*TINY], "give the folder that make_shards wrote with --data.shards"),
    "shards that are not there": ([*TINY, "--data.shards", "nowhere"], "nowhere is not a folder"),
    "shards behind a shell": ([*TINY, "--data.shards", "pipe:touch pwned"], "pipe: is not served"),
    "unfinished shards": ([*TINY, "--data.shards", "unfinished"], "no manifest.json"),
    "a batch above the data": ([*TINY, "--batch", "48"], "48 is larger .* which has 40 pictures"),
    "a batch of odd groups": ([*TINY, "--batch", "6"], "batch of 6 .*--moco.batch-norm-groups"),
    "a misspelt backbone": ([*TINY, "--encoder.backbone", "resnt18"], "near names: .*resnet18"),
    "two stages": ([*TINY, "--encoder.layers", "1", "1"], "--encoder.layers"),
    "kNN shards that are not there": (
        [*TINY, "--steps", "1", "--knn-train", "nowhere", "--knn-test", "nowhere"],
        "nowhere is not a folder",
    ),
    "kNN shards without labels": (
        [*TINY, "--steps", "1", "--knn-train", "no_labels", "--knn-test", "no_labels"],
        "no_labels has no labels",
    ),
    "a missing file of settings": (["demo", "--config", "nowhere.json"], "nowhere.json: no such"),
    "settings that are no JSON": (["demo", "--config", "broken.json"], "is not JSON"),
    "a misspelt setting": (
        ["demo", "--config", "misspelt.json"],
        "no setting 'temprature'; did you mean 'temperature'",
    ),
    "a setting out of range": (["demo", "--config", "range.json"], "--moco.temperature"),
    "settings without a recipe": (["--config", "empty.json"], "recipe"),
}
FILES = {
    "broken.json": "{",
    "misspelt.json": '{"moco": {"temprature": 1.0}}',
    "range.json": '{"moco": {"temperature": 0.0}}',
    "empty.json": "{}",
}


@pytest.fixture
def folder_of_mistakes(tmp_path, shard_set, monkeypatch):
    """The current folder, with wrong files and wrong shards in it."""
    for name in ("unfinished", "no_labels"):
        shutil.copytree(shard_set, tmp_path / name)
    (tmp_path / "unfinished" / "manifest.json").unlink()
    manifest = tmp_path / "no_labels" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "classes": []}))
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(what, folder_of_mistakes, shard_set):
    words, message = WRONG[what]
    if "--data.shards" not in words and what != "no shards":
        words = [*words, "--data.shards", shard_set]
    done = command(*words, "--output", "run")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (folder_of_mistakes / "run").exists()
    assert not (folder_of_mistakes / "pwned").exists()


OUT_OF_RANGE = [
    ("--batch", "0"),
    ("--micro-batch", "0"),
    ("--micro-batch", "1"),
    ("--steps", "0"),
    ("--epochs", "0.0001"),
    ("--epochs", "nan"),
    ("--encoder.dim", "0"),
    ("--encoder.dim", "-1"),
    ("--data.image-px", "0"),
    ("--data.image-px", "-5"),
    ("--data.eval-resize-px", "8"),
    ("--save-minutes", "-1"),
    ("--save-minutes", "nan"),
    ("--data.std", "0", "0.2", "0.2"),
    ("--data.threads", "-1"),
    ("--data.lanes", "3"),
    ("--data.window", "0"),
    ("--moco.queue", "0"),
    ("--moco.temperature", "0"),
    ("--optimiser.lr", "-1"),
    ("--optimiser.lr", "nan"),
    ("--seed", "-1"),
    ("--seed", str(2**63)),
    ("--keep", "1"),
    ("--moco.temperature", "inf"),
    ("--moco.queue", str(10**13)),  # keys of 4.5 PiB
    ("--optimiser.milestones", "0.8", "0.6"),
    ("--optimiser.milestones", "120", "160"),
]


@pytest.mark.parametrize("words", OUT_OF_RANGE, ids=" ".join)
def test_a_number_out_of_range_is_refused_by_its_flag_and_leaves_nothing(
    words, shard_set, tmp_path
):
    length = () if words[0] == "--epochs" else ("--steps", "2")
    given = ("--data.shards", shard_set, "--output", tmp_path / "run", *length)
    done = command(*TINY, *given, *words)
    assert done.code == 2
    assert words[0] in done.err
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_one_line(shard_set, tmp_path):
    (tmp_path / "run").write_text("mine")
    done = command(*TINY, "--data.shards", shard_set, "--output", tmp_path / "run")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_without_a_folder_is_one_line(shard_set):
    done = command(*TINY, "--data.shards", shard_set)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "give one with --output" in done.err


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(six_steps, shard_set):
    before = snapshot(six_steps)
    done = command(*TINY, "--data.shards", shard_set, "--output", six_steps, "--steps", "6")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "holds a run already: add --resume to go on" in done.err
    assert snapshot(six_steps) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder.backbone", "resnet18"], "encoder.backbone = test_resnet, now it is resnet18"),
        (["--batch", "16"], "batch = 8, now it is 16"),
        (["--moco.queue", "8"], "moco.queue = 20, now it is 8"),
        (["--seed", "1"], "seed = 0, now it is 1"),
        (["--steps", "5"], "has done 6 steps, --steps or --epochs ask for 5 in all"),
    ],
    ids=lambda value: "".join(value),
)
def test_a_resume_with_other_settings_is_refused(six_steps, shard_set, words, message):
    before = snapshot(six_steps)
    given = ("--data.shards", shard_set, "--output", six_steps, "--steps", "6", "--resume")
    done = command(*TINY, *given, *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert message in done.err
    assert snapshot(six_steps) == before


def test_a_second_run_beside_one_that_goes_on_is_refused(six_steps, shard_set, tmp_path):
    shutil.copytree(six_steps, tmp_path / "run")
    code = "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
    code += "from eval.run_lock import hold; hold(Path(sys.argv[1]), is_restart=False)\n"
    code += "print(flush=True); sys.stdin.read()"
    words = [*warm_python(), "-c", code, str(tmp_path / "run"), str(ROOT)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        before = snapshot(tmp_path / "run")
        given = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "8")
        done = command(*TINY, *given, "--resume")
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert "another run is going on in" in done.err
        assert snapshot(tmp_path / "run") == before


def test_a_resume_on_another_data_set_is_refused(six_steps, tmp_path, pack_set, clean_pictures):
    other = pack_set(tmp_path / "other", clean_pictures[::-1], (40,))
    before = snapshot(six_steps)
    done = command(*TINY, "--data.shards", other, "--output", six_steps, "--steps", "6", "--resume")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "was trained on data set" in done.err
    assert snapshot(six_steps) == before


def test_a_resume_with_another_recipe_names_it_first(six_steps, shard_set):
    words = ("--data.shards", shard_set, "--output", six_steps, "--steps", "6", "--resume")
    done = command("moco-v2", *TINY[1:], *words, "--moco.batch-norm-groups", "4")
    assert done.code == 2
    assert "was trained with recipe = demo, now it is moco-v2; " in done.err
    assert re.search(r"and \d+ more: use", done.err)


@pytest.mark.parametrize("exists", [True, False])
def test_a_resume_from_nothing_is_refused(tmp_path, shard_set, exists):
    if exists:
        (tmp_path / "run").mkdir()
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--resume")
    done = command(*TINY, *words)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "holds no checkpoint" in done.err
    assert not exists or not list((tmp_path / "run").iterdir())


def test_the_corrected_command_may_use_the_same_folder(tmp_path, shard_set):
    words = ("--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "1")
    assert command(*TINY, *words, "--batch", "48").code == 2
    trained(tmp_path / "run", shard_set, "--steps", "1")


# Two processes -----------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, shard_set):
    """The same run in this process and in two, as a launcher starts them; what the two said."""
    folder = tmp_path_factory.mktemp("two")
    words = ["--data.shards", str(shard_set), "--steps", "4", "--batch", "16",
             "--moco.batch-norm-groups", "2", "--data.image-px", "64",
             "--data.eval-resize-px", "64"]  # fmt: skip
    judged = ["--knn-train", str(shard_set), "--knn-test", str(shard_set), "--knn-every", "2"]
    environment = without_gpus(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                               MASTER_PORT=free_port())  # fmt: skip
    ranks = [
        subprocess.Popen(
            [*warm_python(), ROOT / "train.py", *TINY, *words, "--output", "run", *judged],
            cwd=folder,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    command(*TINY, *words, "--output", folder / "alone")
    return folder / "alone", folder / "run", said


def without_gpus(**more):
    """The environment of processes that are several of a run, on one core each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    environment.pop("ACCELERATE_USE_CPU")
    return environment


def launched(folder, *words, restarts=0):
    """``accelerate launch`` of two processes, started."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
              "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", free_port(), "--max_restarts", str(restarts)]  # fmt: skip
    return subprocess.Popen(
        [*launch, ROOT / "train.py", *TINY, *words],
        cwd=folder,
        env=without_gpus(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until(process, start):
    """Its output up to a line that starts so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError("".join(lines) + process.stderr.read())


@pytest.mark.slow
def test_a_signal_under_accelerate_launch_saves_and_the_run_goes_on_to_the_same_end(
    shard_set, tmp_path
):
    words = ("--data.shards", shard_set, "--steps", "400", "--output")
    run = (*words, "run", "--resume", "auto")
    first = launched(tmp_path, *run)
    lines_until(first, "step 3/")
    first.send_signal(signal.SIGTERM)  # as a scheduler does: the launcher hands it on
    out, err = first.communicate()
    assert first.returncode != 0
    stopped = re.search(r"stopped by SIGTERM after step (\d+) of 400 and saved", out)
    assert stopped, out + err
    second = launched(tmp_path, *run, restarts=1)
    lines = lines_until(second, f"step {int(stopped[1]) + 3}/")
    assert any(f"resumed after step {stopped[1]} " in line for line in lines)
    workers = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGUSR1)  # one of the two: both save and leave
    out, err = second.communicate()
    assert second.returncode == 0, out + err  # the launcher has started them again
    again = re.search(r"stopped by SIGUSR1 after step (\d+) of 400 and saved", out)
    assert f"resumed after step {again[1]} " in out
    assert f"exitcode  : {RESTART_CODE}" in err or str(RESTART_CODE) in err
    whole = launched(tmp_path, *words, "whole")
    assert whole.communicate() and whole.returncode == 0
    assert_same_checkpoint(tmp_path / "run", tmp_path / "whole", 400)


def test_two_processes_see_the_same_global_batches_as_one(one_and_two):
    alone, both, _ = one_and_two
    for (step, loss, rate), (_, expected, expected_rate) in zip(
        logged(both, "loss", "learning_rate"), logged(alone, "loss", "learning_rate"), strict=True
    ):
        # Rounding grows tenfold a step: batch norm over a few pictures.
        assert loss == pytest.approx(expected, abs=1e-5 if step <= 3 else 3e-3)
        assert rate == expected_rate


def test_two_processes_end_with_the_checkpoint_of_one(one_and_two):
    alone, both = (load_checkpoint(run / "step-000000004").tensors for run in one_and_two[:2])
    torch.testing.assert_close(both["queue"], alone["queue"], rtol=0, atol=0.02)
    for encoder in ("encoder_q", "encoder_k"):
        for name, tensor in alone[encoder].items():
            difference = (both[encoder][name] - tensor).double().norm()
            assert difference <= 1e-2 * tensor.double().norm() + 1e-3, name


def test_two_processes_speak_with_one_voice(one_and_two):
    _, _, (first, second) = one_and_two
    lines = first.splitlines()
    assert sum(line.startswith("step 4/4") for line in lines) == 1
    assert sum("on 2 x cpu" in line for line in lines) == 1
    assert sum(line.startswith("step 4: kNN top-1") for line in lines) == 1
    assert second == ""


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_with_resume(shard_set, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    words = (*TINY, "--data.shards", shard_set, "--output", tmp_path / "run", "--steps", "1")
    assert command(*words).code == 2
    done = command(*words, "--resume")
    assert done.code == 0 and "no checkpoint yet" in done.out
    assert len((tmp_path / "run" / "run.jsonl").read_text().splitlines()) == 1


# Tars of other software --------------------------------------------------------------------------


def write_foreign(folder, pictures, kind):
    """The pictures of ``shard_set`` in its three shards, by webdataset or as PAX by tarfile."""
    folder.mkdir()
    first = 0
    for number, size in enumerate((9, 20, 11)):
        rows = range(first, first + size)
        path = folder / f"{number:05d}.tar"
        if kind == "webdataset":
            with webdataset.TarWriter(str(path)) as writer:
                for row in rows:
                    sample = {"__key__": f"n{row:09d}", "jpg": pictures[row], "cls": row % 3}
                    writer.write(sample)
        else:
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
                for row in rows:
                    name = f"{'ä' * 120}/{row}"
                    for suffix, data in (("jpeg", pictures[row]), ("cls", b"%d" % (row % 3))):
                        member = tarfile.TarInfo(f"{name}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        first += size


@pytest.mark.parametrize("kind", ["webdataset", "pax"])
def test_foreign_tars_train_and_judge_as_the_same_pictures_packed_by_us(
    kind, shard_set, clean_pictures, tmp_path
):
    write_foreign(tmp_path / "tars", clean_pictures, kind)
    foreign = tmp_path / "index"
    config = check_shards.IndexConfig(shards=(str(tmp_path / "tars"),), output=foreign, workers=1)
    check_shards.index(config, Console(file=io.StringIO()))
    ours = trained(tmp_path / "ours", shard_set, "--steps", "3")
    theirs = trained(tmp_path / "theirs", foreign, "--steps", "3")
    losses = logged(ours, "loss")
    assert logged(theirs, "loss") == losses and len(losses) == 3
    assert_same_checkpoint(ours, theirs, 3)
    judged = checkpoint_encoder(open_checkpoint(theirs, print), "bicubic")
    scores = [
        knn_of_shards(judged, shards, shards, KnnProtocol(k=(3,)), device=torch.device("cpu"))
        for shards in (shard_set, foreign)
    ]
    assert scores[0]["top1"] == scores[1]["top1"] and scores[1]["skipped_images"] == 0
    assert set(scores[1]["per_class"]) == {"0", "1", "2"}
