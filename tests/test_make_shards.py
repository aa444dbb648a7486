import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.entry_list import write_list
from pipeline.packing import Plan, ShardJob, pack_shard, shards_needed
from pipeline.shard_format import read_manifest
from pipeline.shard_store import ShardStore
from pipeline.sources import image_folder
from pipeline.unfinished import read_result
from pipeline.validate import Limits, StoredForm

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "make_shards.py"


def command(*arguments):
    return [sys.executable, str(PROGRAM), *map(str, arguments)]


def make_shards(*arguments, cwd):
    """Run the program as people do, from another folder."""
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )


def packed(*arguments, cwd):
    """Run the program, which must succeed."""
    done = make_shards(*arguments, "--workers", 1, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def lines_of(path):
    """What a JSON lines file says of each file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row.pop("file"): next(iter(row.values())) for row in rows}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def samples_of(folder):
    """Picture and label of each key."""
    store = ShardStore(folder)
    return {
        store.key(shard, index): (store.picture(shard, index).tobytes(), int(record["label"]))
        for shard in range(len(store.manifest.shards))
        for index, record in enumerate(store.records(shard))
    }


def save(root, name, data):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory, draw_photo, encode):
    """A folder with everything that a folder of pictures should not have."""
    root = tmp_path_factory.mktemp("odd") / "pictures"
    scene = draw_photo(1, 80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root, "ant/plain.jpg", encode(scene))
    save(root, "ant/grey.jpg", encode(scene.convert("L")))
    save(root, "ant/with space (1).jpg", encode(draw_photo(2)))
    save(root, "ant/v1.2.jpg", encode(draw_photo(3)))
    save(root, "ant/Same.jpg", encode(draw_photo(4)))
    save(root, "ant/same.jpg", encode(draw_photo(5)))
    save(root, "bee/photo.png", encode(scene, "PNG"))
    save(root, "bee/photo.jpg", encode(scene.convert("CMYK")))
    save(root, "bee/alpha.png", encode(scene.convert("RGBA"), "PNG"))
    save(root, "bee/rotated.jpg", encode(scene, exif=exif))
    deep = Image.fromarray(np.full((20, 30), 65_535, dtype=np.uint16))
    save(root, "bee/deep.png", encode(deep, "PNG"))
    save(root, "кошка/写真.jpg", encode(draw_photo(6)))
    save(root, "кошка/progressive.jpg", encode(scene, progressive=True))
    save(root, "ant/truncated.jpg", encode(scene)[:800])
    save(root, "bee/empty.jpg", b"")
    save(root, "bee/page.jpg", b"<html>404</html>")
    save(root, "bee/notes.txt", b"not a picture")
    (root / "ant" / "loop").symlink_to(root, target_is_directory=True)
    (root / "ant" / "dangling.jpg").symlink_to("nowhere.jpg")
    return root


@pytest.fixture(scope="module")
def odd_set(odd_folder, tmp_path_factory):
    """Shards of ``odd_folder``, made by one process."""
    output = tmp_path_factory.mktemp("packed") / "shards"
    packed(odd_folder, output, "--shard-samples", 4, cwd=output.parent)
    return output


def test_every_usable_picture_is_in_the_shards_once(odd_set, odd_folder):
    samples = samples_of(odd_set)
    assert len(samples) == read_manifest(odd_set).samples == 13
    assert samples["ant/plain"] == ((odd_folder / "ant/plain.jpg").read_bytes(), 0)


def test_class_folders_become_labels(odd_set):
    classes = read_manifest(odd_set).classes
    assert [unicodedata.normalize("NFC", name) for name in classes] == ["ant", "bee", "кошка"]
    labels = {key: label for key, (_, label) in samples_of(odd_set).items()}
    assert labels["ant/grey"] == 0 and labels["bee/rotated"] == 1
    assert sorted(labels.values()) == [0] * 6 + [1] * 5 + [2] * 2


def test_what_is_broken_is_left_out_and_listed_with_its_reason(odd_set):
    refused = lines_of(odd_set / "refused.jsonl")
    assert sorted(refused) == ["ant/truncated.jpg", "bee/empty.jpg", "bee/page.jpg"]
    assert "truncated" in refused["ant/truncated.jpg"]
    assert refused["bee/empty.jpg"] == "empty file"
    assert refused["bee/page.jpg"] == "not a picture in a known format"


def test_what_was_transcoded_is_listed_with_what_it_was(odd_set):
    assert lines_of(odd_set / "changed.jsonl") == {
        "bee/alpha.png": "was PNG",
        "bee/deep.png": "was PNG",
        "bee/photo.jpg": "was CMYK",
        "bee/photo.png": "was PNG",
        "bee/rotated.jpg": "was rotated by EXIF",
        "кошка/progressive.jpg": "was progressive",
    }


def test_every_stored_picture_is_a_baseline_jpeg_of_the_indexed_size(odd_set):
    store = ShardStore(odd_set)
    for shard in range(len(store.manifest.shards)):
        for index, record in enumerate(store.records(shard)):
            image = Image.open(io.BytesIO(store.picture(shard, index)))
            assert image.format == "JPEG" and image.mode in ("RGB", "L")
            assert not image.info.get("progressive")
            assert image.size == (record["width"], record["height"])


def test_odd_names_give_unique_plain_keys(odd_set):
    keys = list(samples_of(odd_set))
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", key) for key in keys)
    assert len({key.lower() for key in keys}) == 13
    assert sum(key.lower().startswith("ant/same-") for key in keys) == 2


def test_shards_hold_no_more_pictures_than_asked_for(odd_set):
    assert [shard.samples <= 4 for shard in read_manifest(odd_set).shards] == [True] * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_pictures_give_the_same_bytes_for_any_number_of_processes(
    odd_set, odd_folder, tmp_path, workers
):
    again = tmp_path / "again"
    done = make_shards(
        *(odd_folder, again, "--shard-samples", 4, "--workers", workers), cwd=tmp_path
    )
    assert done.returncode == 0 and names_in(again) == names_in(odd_set)
    for name in names_in(odd_set):
        assert (again / name).read_bytes() == (odd_set / name).read_bytes(), name


def test_another_seed_gives_another_order_of_the_same_pictures(odd_set, odd_folder, tmp_path):
    packed(odd_folder, "other", "--shard-samples", 4, "--seed", 1, cwd=tmp_path)
    ours, others = samples_of(odd_set), samples_of(tmp_path / "other")
    assert ours == others and list(ours) != list(others)


def test_a_flat_folder_gives_pictures_without_labels(tmp_path, draw_photo, encode):
    for number in range(3):
        save(tmp_path / "flat", f"{number}.jpg", encode(draw_photo(number)))
    done = packed("flat", "shards", cwd=tmp_path)
    assert read_manifest(tmp_path / "shards").classes == () and "none (flat)" in done.stdout
    assert {label for _, label in samples_of(tmp_path / "shards").values()} == {-1}
    expected = ["manifest.json", "shard-000000.index", "shard-000000.tar"]
    assert names_in(tmp_path / "shards") == expected


def test_the_report_counts_what_was_packed_changed_and_refused(odd_folder, tmp_path):
    text = packed(odd_folder, tmp_path / "out", cwd=tmp_path).stdout
    rows = dict(re.findall(r"│ ([a-z ]+?) +│ ([\d,]+)", text))
    assert (rows["pictures"], rows["transcoded"], rows["refused"]) == ("13", "6", "3")
    assert rows["not pictures"] == "3" and "refused.jsonl" in text


def test_the_report_shows_the_name_of_the_output_as_it_is(picture_folder, tmp_path):
    output = tmp_path / "set[v2] :cat:" / "[" / "x]"
    text = packed(picture_folder, output, cwd=tmp_path).stdout
    assert "set[v2] :cat:/[/x]" in text.replace("\n", "")


WRONG_INPUTS = {
    "absent out": "the source absent does not exist",
    "empty out": "the source empty holds no pictures",
    "file out": "the source file is a file",
    "pictures done": "done already holds finished shards",
    "pictures full": "full is not empty",
    "pictures file": "error: file: ",
    "pictures file/out": "file/out: a part of the path is a file",
}


@pytest.mark.parametrize(("words", "message"), WRONG_INPUTS.items(), ids=WRONG_INPUTS)
@pytest.mark.usefixtures("picture_folder")
def test_a_wrong_input_is_one_line_code_2_and_leaves_nothing(tmp_path, words, message):
    save(tmp_path, "file", b"")
    save(tmp_path, "done/manifest.json", b"{}")
    save(tmp_path, "full/thesis.txt", b"precious")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = make_shards(*words.split(), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("limit", "code"), [(0.6, 0), (0.4, 3), (0, 3)])
def test_more_refused_pictures_than_allowed_end_it_with_code_3(
    tmp_path, encode, draw_photo, limit, code
):
    for number in range(2):
        save(tmp_path, f"half/{number}.jpg", encode(draw_photo(number)))
        save(tmp_path, f"half/{number}.png", b"<html>")
    done = make_shards("half", "out", "--max-refused", limit, cwd=tmp_path)
    assert done.returncode == code
    assert len(lines_of(tmp_path / "out" / "refused.jsonl")) == 2
    assert (tmp_path / "out" / "manifest.json").exists() == (code == 0)
    if code:
        assert "2 of 4 pictures of half were refused, 2 of them: not a picture" in done.stderr
        packed("half", "out", cwd=tmp_path)  # the unfinished folder can be filled


def test_a_source_without_a_usable_picture_ends_with_code_3_whatever_is_allowed(tmp_path):
    save(tmp_path, "broken/1.jpg", b"")
    done = make_shards("broken", "out", "--max-refused", 1, cwd=tmp_path)
    assert done.returncode == 3 and "1 of 1 pictures" in done.stderr


def test_what_is_no_picture_by_its_name_is_listed(odd_set):
    assert lines_of(odd_set / "ignored.jsonl") == {
        "ant/dangling.jpg": "link to nothing",
        "ant/loop": "link to a folder that is walked by another way",
        "bee/notes.txt": "ending .txt",
    }


def test_limits_and_form_are_flags_and_are_kept_in_the_manifest(picture_folder, tmp_path):
    flags = "--resize 30 --quality 80 --min-side-px 41 --max-aspect 1.39 --no-validate"
    packed(picture_folder, "out", *flags.split(), cwd=tmp_path)
    made_by = read_manifest(tmp_path / "out").made_by
    assert (made_by["resize"], made_by["quality"], made_by["validate"]) == (30, 80, False)
    refused = lines_of(tmp_path / "out" / "refused.jsonl")
    assert [reason.partition(":")[0] for reason in refused.values()] == [
        "too small",
        "too elongated",
    ]
    for shard in ShardStore(tmp_path / "out").records(0):
        assert min(shard["width"], shard["height"]) == 30


@pytest.mark.parametrize(
    "words",
    [
        *("--shard-mib 0", "--shard-samples 0", "--workers -1", "--seed -1", "--shrad-mib 5"),
        *("--max-refused 1.5", "--quality 0", "--max-pixels -1"),
    ],
)
def test_a_wrong_number_or_flag_is_code_2_and_leaves_nothing(picture_folder, tmp_path, words):
    done = make_shards(picture_folder, "out", *words.split(), cwd=tmp_path)
    assert done.returncode == 2 and words.split()[0] in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_shards_of_other_software_in_the_output_are_not_touched(picture_folder, tmp_path):
    # WebDataset's own examples call their files just so.
    save(tmp_path, "foreign/shard-000000.tar", b"a year of work")
    done = make_shards(picture_folder, "foreign", cwd=tmp_path)
    assert done.returncode == 2 and "is not empty" in done.stderr
    assert (tmp_path / "foreign/shard-000000.tar").read_bytes() == b"a year of work"


@pytest.fixture
def long_work(request, tmp_path, draw_photo):
    """A process that has much to pack, with two workers that have begun, and its output.

    Its shards have 5 pictures, or as many as the test's parameter says.
    """
    shard_samples = getattr(request, "param", 5)
    (tmp_path / "many").mkdir()
    draw_photo(0, 900, 600).save(tmp_path / "one.png")
    for number in range(3000):
        os.link(tmp_path / "one.png", tmp_path / "many" / f"{number}.png")
    process = subprocess.Popen(
        command("many", "out", "--shard-samples", shard_samples, "--workers", 2),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives it
    )
    # A tar alone is not finished yet, and a stop takes it away.
    begun = ".packing/done-*" if shard_samples == 5 else ".shard-*.part"
    wait_until(lambda: any((tmp_path / "out").glob(begun)))
    yield process, tmp_path / "out"
    if group_lives(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(happened, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def group_lives(group):
    """Whether a process of the group runs (one that nobody has waited for does not)."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


@pytest.mark.parametrize("long_work", [1500], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_a_shard_is_finished_it_ends_at_once_and_leaves_nothing(long_work, number):
    process, output = long_work
    # Ctrl-C reaches the whole group, a polite kill the program alone.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and not output.exists()
    assert error == ("interrupted\n" if number == signal.SIGINT else "")
    wait_until(lambda: not group_lives(process.pid))


def test_stopped_with_finished_shards_it_keeps_them_and_the_same_command_goes_on(long_work):
    process, output = long_work
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_until(lambda: not group_lives(process.pid))
    assert process.returncode == 130 and not (output / "manifest.json").exists()
    assert list(output.glob("shard-*.tar")) and not list(output.glob(".shard-*"))


def test_a_hard_kill_leaves_nothing_half_done_and_no_workers_and_other_pictures_can_follow(
    long_work, picture_folder, tmp_path
):
    process, output = long_work
    process.kill()
    process.wait()
    wait_until(lambda: not group_lives(process.pid))
    assert not (output / "manifest.json").exists()
    for path in output.glob("shard-*.tar"):  # what has its final name is complete
        with tarfile.open(path) as tar:
            assert len(tar.getmembers()) == 5
    packed(picture_folder, output, cwd=tmp_path)
    names = picture_folder.rglob("*.jpg")
    assert samples_of(output).keys() == {f"{path.parent.name}/{path.stem}" for path in names}
    assert names_in(output) == ["manifest.json", "shard-000000.index", "shard-000000.tar"]


@pytest.fixture(scope="module")
def sixty(tmp_path_factory, draw_photo):
    """Sixty pictures that take a while, and the shards of an undisturbed packing."""
    folder = tmp_path_factory.mktemp("sixty")
    for number in range(60):
        path = folder / "pictures" / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_photo(number, 640, 480).save(path, compress_level=1)
    save(folder, "pictures/ant/broken.jpg", b"<html>")
    packed("pictures", "whole", "--shard-samples", 4, cwd=folder)
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def times_of(output):
    """When each finished shard was written."""
    tars = [output / f"shard-{path.stem[5:]}.tar" for path in (output / ".packing").glob("done-*")]
    return {tar.name: tar.stat().st_mtime_ns for tar in tars}


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_finishes_with_the_bytes_of_an_undisturbed_packing(
    sixty, tmp_path, kills
):
    output, finished, moments = tmp_path / "out", {}, np.random.default_rng(kills)
    arguments = command("pictures", output, "--shard-samples", 4, "--workers", 2)
    done = 0
    while done < kills:
        process = subprocess.Popen(
            arguments, cwd=sixty, stdout=subprocess.DEVNULL, start_new_session=True
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moments.uniform(0.5, 2.0))
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        process.wait()
        wait_until(lambda pid=process.pid: not group_lives(pid))
        if (output / "manifest.json").exists():  # it was faster than the kill
            assert bytes_of(output) == bytes_of(sixty / "whole")
            shutil.rmtree(output)
            finished = {}
            continue
        now = times_of(output) if output.exists() else {}
        assert finished.items() <= now.items()  # no finished shard is done again
        finished = now
    text = packed("pictures", output, "--shard-samples", 4, cwd=sixty).stdout
    assert bytes_of(output) == bytes_of(sixty / "whole")
    assert (f"{len(finished)} of 16 shards are finished already" in text) == bool(finished)
    assert not (output / ".packing").exists()


def test_after_a_full_disk_nothing_is_half_written_and_it_goes_on(sixty, tmp_path):
    # To a program a limit on the size of a file is what a full disk is: an error while it writes.
    sizes = [path.stat().st_size for path in sorted((sixty / "whole").glob("*.tar"))]
    program = (
        f"import resource, runpy, sys; limit = {max(sizes) - 1};"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = command("pictures", tmp_path / "out", "--shard-samples", 4, "--workers", 1)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments[1:]], cwd=sixty, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert re.search(r"out/shard-\d+\.tar: the file would be larger than is allowed", done.stderr)
    kept = times_of(tmp_path / "out")
    assert len(kept) == sizes.index(max(sizes)) > 0
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == set(kept)
    packed("pictures", tmp_path / "out", "--shard-samples", 4, cwd=sixty)
    assert bytes_of(tmp_path / "out") == bytes_of(sixty / "whole")


def test_a_folder_that_is_being_filled_is_refused_to_another(long_work, tmp_path):
    os.killpg(long_work[0].pid, signal.SIGSTOP)  # else it might be at its end before the other
    done = make_shards("many", "out", cwd=tmp_path)
    assert done.returncode == 2 and "being filled by another make_shards" in done.stderr
    assert long_work[0].poll() is None


def test_parts_and_the_command_that_joins_them_give_the_same_bytes(sixty, tmp_path):
    words = ("pictures", tmp_path / "out", "--shard-samples", 4)
    for part in ("2/3", "1/3"):
        packed(*words, "--part", part, cwd=sixty)
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert len(times_of(tmp_path / "out")) == 11
    other = make_shards(*words, "--part", "3/3", "--seed", 1, cwd=sixty)
    assert other.returncode == 2 and "with other settings" in other.stderr
    packed(*words, "--part", "3/3", cwd=sixty)
    before = times_of(tmp_path / "out")
    text = packed(*words, cwd=sixty).stdout
    assert "16 of 16 shards are finished already" in text and len(before) == 16
    assert bytes_of(tmp_path / "out") == bytes_of(sixty / "whole")


@pytest.mark.slow
def test_on_ray_the_bytes_are_the_same_and_a_stopped_packing_goes_on(sixty, tmp_path):
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    words = ("pictures", tmp_path / "out", "--shard-samples", 4)
    packed(*words, "--part", "1/4", cwd=sixty)
    done = make_shards(*words, "--ray", "--workers", 2, cwd=sixty)
    assert done.returncode == 0, done.stderr
    assert "4 of 16 shards are finished already" in done.stdout
    assert bytes_of(tmp_path / "out") == bytes_of(sixty / "whole")


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "-1/3"])
def test_a_part_that_is_none_is_one_line(picture_folder, tmp_path, part):
    done = make_shards(picture_folder, "out", "--part", part, cwd=tmp_path)
    assert done.returncode == 2 and "such as 3/64" in done.stderr


@pytest.mark.parametrize(
    ("total_bytes", "count", "shard_bytes", "shard_samples", "shards"),
    [
        (50, 5, 1000, 2, 3),
        (50, 5, 30, 100, 2),
        (60, 2, 30, 100, 2),
        (0, 1, 1, 1, 1),
        (900, 2, 1, 9, 2),
    ],
)
def test_as_many_shards_as_bytes_and_pictures_ask_for(
    total_bytes, count, shard_bytes, shard_samples, shards
):
    assert shards_needed(total_bytes, count, shard_bytes, shard_samples) == shards


def test_shards_are_equal_but_for_one_picture(sixty):
    samples = [shard.samples for shard in read_manifest(sixty / "whole").shards]
    assert len(samples) == 16 and sum(samples) == 60 and set(samples) <= {2, 3, 4}


def test_side_cars_become_metadata(tmp_path, draw_photo, encode):
    for number in range(3):
        save(tmp_path, f"in/{number}.jpg", encode(draw_photo(number)))
    save(tmp_path, "in/0.json", b'{"tags": ["cat", "\\u00e9"]}')
    save(tmp_path, "in/1.jpg.json", b"[1]")
    packed("in", "out", cwd=tmp_path)
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        metadata = {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith("json")}
    assert {name: json.loads(data) for name, data in metadata.items()} == {
        "0.json": {"tags": ["cat", "é"]}
    }
    changed = lines_of(tmp_path / "out" / "changed.jsonl")
    assert changed == {"1.jpg": "without its metadata: 1.jpg.json holds no object"}


def test_a_picture_that_is_gone_when_its_turn_comes_is_refused(tmp_path, draw_photo, encode):
    save(tmp_path, "in/1.jpg", encode(draw_photo(0)))
    save(tmp_path, "in/secret.jpg", encode(draw_photo(0)))
    plan = plan_of(tmp_path)
    (tmp_path / "in/secret.jpg").unlink()
    result = pack_shard(ShardJob(plan, 0))
    assert result.refused == [("secret.jpg", "cannot be read: No such file or directory")]
    assert result.info.samples == 1 and read_result(plan.output, 0) == result


def test_a_shard_without_a_usable_picture_is_not_written(tmp_path):
    save(tmp_path, "in/1.jpg", b"<html>")
    plan = plan_of(tmp_path)
    result = pack_shard(ShardJob(plan, 0))
    assert result.info is None and len(result.refused) == 1
    assert names_in(plan.output) == [".packing"] and read_result(plan.output, 0) == result


def plan_of(folder):
    """The plan of one shard with the pictures of ``folder/in``."""
    (folder / "out/.packing/list").mkdir(parents=True)
    listed = write_list(folder / "out/.packing/list", image_folder(folder / "in").entries)
    return Plan(
        output=folder / "out",
        list_folder=listed.folder,
        count=listed.count,
        shards=1,
        seed=0,
        classes=(),
        limits=Limits(),
        form=StoredForm(),
    )
