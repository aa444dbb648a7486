import io
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import engines
from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, cpu_threads
from pipeline.loader import PairLoader
from pipeline.program import DataError, InputError
from pipeline.quarantine import BadSample, Quarantine
from pipeline.shard_format import index_bytes, read_index
from pipeline.torch_views import make_views
from pipeline.view_recipe import PAIRS, ViewRequest, draw_view

STEPS_PER_EPOCH = 5  # 40 pictures, 8 a step


@pytest.fixture(params=["dali", "kernels", "torchvision"])
def engine(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    return request.param


def loader_of(folder, engine="torchvision", views="moco-v2", **options):
    config = DataConfig(
        shards=folder, views=views, image_px=24, window=16, threads=1, engine=engine, lanes=4
    )
    given = {"global_batch": 8, "seed": 1, "device": torch.device("cpu"), **options}
    bad_share = given.pop("max_bad_share", 1.0)
    return PairLoader(replace(config, max_bad_share=bad_share), **given)


def batches_of(folder, engine, count, **options):
    with loader_of(folder, engine, **options) as loader:
        return [next(loader) for _ in range(count)]


def assert_equal(one, other, rows=slice(None), other_rows=None):
    """The same samples with the same views, bit by bit."""
    other_rows = rows if other_rows is None else other_rows
    assert one.sample_N[rows].tolist() == other.sample_N[other_rows].tolist()
    assert one.label_N[rows].tolist() == other.label_N[other_rows].tolist()
    assert torch.equal(one.query_N3HW[rows], other.query_N3HW[other_rows])
    assert torch.equal(one.key_N3HW[rows], other.key_N3HW[other_rows])


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def place_of(sample):
    """Shard and index of a sample of ``shard_set``."""
    shard = int(np.searchsorted([9, 29], sample, side="right"))
    return shard, sample - (0, 9, 29)[shard]


def with_garbage(pack_set, folder, pictures, samples):
    """The shards of ``shard_set`` where some pictures break off, which only a decoder notices."""
    damaged = [p[: len(p) * 2 // 3] if n in samples else p for n, p in enumerate(pictures)]
    return pack_set(folder / "garbage", damaged, (9, 20, 11))


def test_a_loader_that_starts_at_a_step_equals_one_that_arrives_there(shard_set, engine):
    walked = batches_of(shard_set, engine, 8)
    for step in (2, 5):  # in the first epoch, at the start of the second
        started = batches_of(shard_set, engine, 3, start_step=step)
        for one, other in zip(started, walked[step:], strict=False):
            assert one.step == other.step
            assert_equal(one, other)


def test_the_ranks_end_to_end_are_the_batches_of_one_process(shard_set, engine):
    whole = batches_of(shard_set, engine, 6)
    for world in (2, 4):
        parts = [batches_of(shard_set, engine, 6, rank=r, world=world) for r in range(world)]
        for step, batch in enumerate(whole):
            for rank in range(world):
                rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
                assert_equal(parts[rank][step], batch, slice(None), rows)


def test_an_epoch_has_every_picture_once_with_its_label(shard_set, engine):
    batches = batches_of(shard_set, engine, STEPS_PER_EPOCH)
    samples = np.concatenate([batch.sample_N for batch in batches])
    assert sorted(samples.tolist()) == list(range(40))
    assert (np.concatenate([batch.label_N for batch in batches]) == samples % 3).all()
    assert [batch.step for batch in batches] == list(range(5))


def test_views_are_those_of_the_recipe_for_the_sample_and_its_epoch(shard_set, clean_pictures):
    # One sample, worked out by hand from the parameters to the pixels.
    batch = batches_of(shard_set, "torchvision", 7)[6]
    sample = int(batch.sample_N[3])
    size = Image.open(io.BytesIO(clean_pictures[sample])).size
    view = draw_view(PAIRS["moco-v2"][1], np.array([size]), (1, 1, 1), np.array([sample]))
    request = ViewRequest([np.frombuffer(clean_pictures[sample], np.uint8)], (view,))
    (expected,) = make_views(request, 24, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(batch.key_N3HW[3], expected[0])


def test_query_and_key_differ_and_so_do_the_epochs(shard_set, engine):
    batches = batches_of(shard_set, engine, 2 * STEPS_PER_EPOCH)
    by_sample = {}
    for batch in batches:
        assert not (batch.query_N3HW == batch.key_N3HW).all(dim=(1, 2, 3)).any()
        for row, sample in enumerate(batch.sample_N):
            by_sample.setdefault(int(sample), []).append(batch.query_N3HW[row])
    assert not any(torch.equal(*views) for views in by_sample.values())


def test_another_seed_gives_other_batches(shard_set):
    (one,), (other,) = (batches_of(shard_set, "torchvision", 1, seed=seed) for seed in (1, 2))
    assert one.sample_N.tolist() != other.sample_N.tolist()


@pytest.mark.parametrize("half", [False, True])
def test_batches_have_the_promised_shape_and_type(shard_set, engine, half):
    (batch,) = batches_of(shard_set, engine, 1, half=half)
    assert batch.query_N3HW.shape == batch.key_N3HW.shape == (8, 3, 24, 24)
    assert batch.query_N3HW.dtype == (torch.float16 if half else torch.float32)
    assert batch.sample_N.dtype == batch.label_N.dtype == np.int64 and batch.replaced == 0


def test_a_flipped_bit_is_replaced_logged_and_leaves_the_rest_alone(
    shard_set, own_set, flip_bit, engine, tmp_path
):
    flip_bit(own_set, 1, 4)  # sample 13
    clean = batches_of(shard_set, engine, 7)
    log = tmp_path / "quarantine.jsonl"
    damaged = batches_of(own_set, engine, 7, quarantine_path=log)
    check_replaced(clean, damaged, {13})
    line = lines_of(log)[0]
    assert (line["shard"], line["index"], line["key"]) == ("shard-000001.tar", 4, "bee/picture013")
    assert line["reason"].startswith("crc32 ") and line["step"] < STEPS_PER_EPOCH


def test_an_undecodable_picture_is_replaced_logged_and_leaves_the_rest_alone(
    shard_set, pack_set, clean_pictures, engine, tmp_path
):
    folder = with_garbage(pack_set, tmp_path, clean_pictures, {13, 31})
    clean = batches_of(shard_set, engine, 7)
    log = tmp_path / "quarantine.jsonl"
    damaged = batches_of(folder, engine, 7, quarantine_path=log)
    check_replaced(clean, damaged, {13, 31})
    assert {line["key"] for line in lines_of(log)} == {"bee/picture013", "bee/picture031"}
    assert all(line["reason"].startswith("cannot be decoded: ") for line in lines_of(log))


def test_a_header_that_lies_is_replaced_before_a_decoder_believes_it(
    shard_set, pack_set, clean_pictures, with_size, engine, tmp_path, monkeypatch
):
    bomb = with_size(clean_pictures[13], 60_000, 60_000)
    pictures = [*clean_pictures[:13], bomb, *clean_pictures[14:31], b"<html>", *clean_pictures[32:]]
    folder, log = pack_set(tmp_path / "lies", pictures, (9, 20, 11)), tmp_path / "quarantine.jsonl"
    with loader_of(folder, engine, quarantine_path=log) as loader:
        monkeypatch.setattr(loader, "_repair", None)  # no decoder is to complain
        damaged = [next(loader) for _ in range(7)]
    check_replaced(batches_of(shard_set, engine, 7), damaged, {13, 31})
    reasons = {line["key"]: line["reason"] for line in lines_of(log)}
    assert reasons == {
        "bee/picture013": "too many pixels: 60000x60000, the limit is 128000000 in all",
        "bee/picture031": "not a picture in a known format",
    }


def check_replaced(clean, damaged, bad):
    """Bad samples have stand-ins and everything else is as in the clean run, bit by bit."""
    met = 0
    for one, other in zip(clean, damaged, strict=True):
        fine = ~np.isin(one.sample_N, list(bad))
        assert_equal(one, other, fine)
        assert not np.isin(other.sample_N, list(bad)).any()
        assert (other.label_N == other.sample_N % 3).all()
        assert other.replaced == (~fine).sum() and torch.isfinite(other.query_N3HW).all()
        met += other.replaced
    assert met >= len(bad)


def test_stand_ins_are_the_same_in_every_rerun_resume_and_world(
    pack_set, clean_pictures, flip_bit, engine, tmp_path
):
    folder = with_garbage(pack_set, tmp_path, clean_pictures, {3, 13, 31})
    flip_bit(folder, 1, 2)
    walked = batches_of(folder, engine, 7)
    for one, other in zip(batches_of(folder, engine, 7), walked, strict=True):
        assert_equal(one, other)
    for one, other in zip(batches_of(folder, engine, 4, start_step=3), walked[3:], strict=True):
        assert_equal(one, other)
    for rank in range(2):
        for one, other in zip(
            batches_of(folder, engine, 7, rank=rank, world=2), walked, strict=True
        ):
            assert_equal(one, other, slice(None), slice(4 * rank, 4 * rank + 4))


def test_a_stand_in_shows_the_views_that_belong_to_it(pack_set, clean_pictures, engine, tmp_path):
    folder = with_garbage(pack_set, tmp_path, clean_pictures, {13})
    with loader_of(folder, engine) as loader:
        batch = next(batch for batch in loader if batch.replaced)
        planned = loader.plan(batch.step)
        row = planned.places.sample.tolist().index(13)
        stand_in = int(batch.sample_N[row])
    assert stand_in != 13
    own = batches_of(folder, engine, STEPS_PER_EPOCH)
    for other in own:  # the stand-in's own turn in the same epoch: the same picture, same views
        for place in np.flatnonzero(other.sample_N == stand_in):
            assert torch.equal(other.query_N3HW[place], batch.query_N3HW[row])


@pytest.mark.parametrize("first", ["flipped", "garbage"])
def test_a_stand_in_that_is_bad_as_well_gets_a_stand_in(
    shard_set, pack_set, clean_pictures, flip_bit, engine, tmp_path, first
):
    with loader_of(shard_set) as loader:
        step, row = 1, 2
        places = loader.order.batch(step)
        stand_ins = [
            int(loader.order.replacement(step, places.position[row : row + 1], n).sample[0])
            for n in (1, 2, 3)
        ]
    sample = int(places.sample[row])
    bad = {sample, *stand_ins[:2]}
    assert len(bad) == 3 and stand_ins[2] not in bad
    folder = with_garbage(pack_set, tmp_path, clean_pictures, bad - {sample})
    if first == "garbage":
        folder = with_garbage(pack_set, tmp_path / "all", clean_pictures, bad)
    else:
        flip_bit(folder, *place_of(sample))
    (batch,) = batches_of(folder, engine, 1, start_step=step)
    assert batch.sample_N[row] == stand_ins[2]


def drop(folder, shard, indices):
    path = folder / f"shard-{shard:06d}.index"
    records = read_index(path).copy()
    records["flags"][indices] = 1
    path.write_bytes(index_bytes(records))


def test_many_bad_samples_that_are_not_in_a_row_do_not_count_as_a_row(
    pack_set, clean_pictures, tmp_path
):
    folder = pack_set(tmp_path / "many", [clean_pictures[0]] * 400, (400,))
    drop(folder, 0, slice(0, 400, 3))
    (batch,) = batches_of(folder, "torchvision", 1, global_batch=400)
    assert batch.replaced == 134


def test_a_hundred_bad_samples_in_a_row_end_the_run(own_set, engine, tmp_path):
    for tar in own_set.glob("*.tar"):
        tar.unlink()
    log = tmp_path / "quarantine.jsonl"
    with loader_of(own_set, engine, quarantine_path=log) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"100 samples in a row .*unreadable shard.*jsonl"):
                next(loader)
        assert loader.quarantine.bad == 100
    assert 30 < len(lines_of(log)) <= 40  # each of the forty samples once


def test_pictures_of_which_none_decodes_end_the_run(pack_set, clean_pictures, engine, tmp_path):
    folder = with_garbage(pack_set, tmp_path, clean_pictures, set(range(40)))
    with (
        loader_of(folder, engine) as loader,
        pytest.raises(DataError, match=r"100 samples in a row .*cannot be decoded: "),
    ):
        next(loader)


def bad_sample(**changes):
    given = {"step": 0, "shard": "a.tar", "index": 0, "key": "k", "reason": "why", **changes}
    return BadSample(**given)


def test_a_bad_sample_is_logged_once_a_step_however_often_it_was_tried(tmp_path):
    quarantine = Quarantine(tmp_path / "log", 1.0)
    met = [bad_sample(step=step, index=index) for step in (3, 8, 3, 100) for index in (0, 1, 0)]
    for sample in met:
        quarantine.reject(sample)
    places = [(line["step"], line["index"]) for line in lines_of(tmp_path / "log")]
    assert places == [(3, 0), (3, 1), (8, 0), (8, 1), (100, 0), (100, 1)]
    assert quarantine.bad == len(met)


def fill(quarantine, good, bad):
    for _ in range(good):
        quarantine.accept()
    for number in range(bad):
        quarantine.reject(bad_sample(index=number))


def test_a_share_of_bad_samples_above_the_limit_ends_the_run():
    quarantine = Quarantine(None, 0.05)
    fill(quarantine, good=948, bad=51)  # 51 of 999: too early to judge
    with pytest.raises(DataError, match=r"52 of 1000 .* more than --data\.max-bad-share 0\.05"):
        fill(quarantine, good=0, bad=1)


def test_a_share_of_bad_samples_at_the_limit_is_borne():
    quarantine = Quarantine(None, 0.05)
    fill(quarantine, good=950, bad=50)
    assert quarantine.bad == 50


def test_one_good_sample_ends_a_row_of_bad_ones():
    quarantine = Quarantine(None, 1.0)
    for _ in range(3):
        fill(quarantine, good=1, bad=99)
    with pytest.raises(DataError, match="100 samples in a row"):
        fill(quarantine, good=0, bad=1)


def test_an_error_of_the_reader_reaches_the_consumer_every_time(own_set, engine):
    for index in own_set.glob("*.index"):
        index.write_bytes(b"damaged")
    met = []

    def consume():
        for _ in range(4):
            with pytest.raises(
                InputError, match=r"100 samples in a row .*index is not a shard index"
            ):
                next(loader)
            met.append(1)

    with loader_of(own_set, engine) as loader:
        consumer = threading.Thread(target=consume, daemon=True)  # a hang must not hang the tests
        consumer.start()
        consumer.join(timeout=60)
    assert len(met) == 4


def test_a_loader_closes_at_once_when_it_was_never_asked(shard_set, engine):
    started = time.monotonic()
    loader = loader_of(shard_set, engine)
    loader.close()
    assert time.monotonic() - started < 20 and readers() == []


def test_a_loader_closes_in_the_middle_and_may_be_closed_again(shard_set, engine):
    loader = loader_of(shard_set, engine)
    next(loader)
    time.sleep(0.3)  # the reader stands at its full queue
    loader.close()
    loader.close()
    assert readers() == []


def test_a_loader_closes_when_its_consumer_fails(shard_set, engine):
    with pytest.raises(ZeroDivisionError), loader_of(shard_set, engine) as loader:
        next(loader)
        raise ZeroDivisionError
    assert readers() == []


def test_a_loader_that_cannot_be_made_leaves_no_thread(shard_set):
    for wrong in ({"global_batch": 64}, {"world": 3}, {"seed": -1}):
        with pytest.raises(InputError):
            loader_of(shard_set, **wrong)
    assert readers() == []


def test_without_shards_the_flag_is_named():
    with pytest.raises(InputError, match=r"--data\.shards"):
        loader_of(None)


def test_a_gpu_gets_dali_where_it_is_installed_and_all_else_the_kernels(monkeypatch):
    monkeypatch.setattr(engines, "DaliEngine", object)
    assert engines.engine_for(torch.device("cuda", 0)) == "dali"
    assert engines.engine_for(torch.device("cpu")) == "kernels"
    monkeypatch.setattr(engines, "DaliEngine", None)
    assert engines.engine_for(torch.device("cuda", 0)) == "kernels"


def test_dali_that_is_asked_for_and_absent_is_an_input_error(shard_set, monkeypatch):
    monkeypatch.setattr(engines, "DaliEngine", None)
    with pytest.raises(InputError, match=r"--data\.engine dali: DALI is not installed"):
        loader_of(shard_set, "dali")
    assert readers() == []


def test_without_dali_the_automatic_engine_is_torchvision(shard_set, monkeypatch):
    expected = batches_of(shard_set, "torchvision", 1)
    monkeypatch.setattr(engines, "DaliEngine", None)
    assert_equal(batches_of(shard_set, "auto", 1)[0], expected[0])


@pytest.mark.parametrize(("processes", "threads"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, processes, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert cpu_threads(DataConfig()) == threads
    assert cpu_threads(DataConfig(threads=7)) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_loader_that_starts_at_a_step_equals_one_that_arrives_there(shard_set):
    device = torch.device("cuda", 0)
    walked = batches_of(shard_set, "dali", 6, device=device, half=True)
    (started,) = batches_of(shard_set, "dali", 1, device=device, half=True, start_step=5)
    assert_equal(started, walked[5])
    assert started.query_N3HW.is_contiguous(memory_format=torch.channels_last)
