"""The messy pack of real, broken and odd files: what becomes of each kind.

Its MANIFEST.tsv calls a file ``control`` or ``odd`` when Pillow decodes it and ``bad`` when Pillow
does not; the table below says what make_shards does with it.
"""

import csv
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.shard_format import read_manifest
from tests.messy_folder import PROGRAM, decoded_by_dali, run_measured, stored

# (outcome, verdict of the manifest): files
OUTCOMES = {
    ("kept", "control"): 2,
    ("kept", "odd"): 24,  # awkward names, duplicates, one pixel, grey, odd EXIF, a stereo pair ...
    ("was PNG", "control"): 1,
    ("was PNG", "odd"): 24,  # 1 and 16 bits, palettes, alpha, animated, EXIF, 100 megapixels ...
    ("was WEBP", "control"): 1,
    ("was WEBP", "odd"): 9,
    ("was GIF", "odd"): 10,
    ("was TIFF", "odd"): 7,  # 12, 16 and 32 bits, floats, planes, pages, CMYK
    ("was BMP", "odd"): 2,
    ("was AVIF", "odd"): 1,
    ("was ICO", "odd"): 1,
    ("was PSD", "odd"): 1,
    ("was JPEG2000", "odd"): 1,
    ("was CMYK", "odd"): 3,
    ("was progressive", "odd"): 4,
    ("was rotated by EXIF", "odd"): 13,
    ("was not baseline", "odd"): 1,  # arithmetic codes
    ("was damaged", "odd"): 4,  # libjpeg warns of them
    ("refused, damaged", "odd"): 1,  # broken_data_stream.png: not every Pillow decodes it
    ("refused, damaged", "bad"): 10,
    ("refused, damaged header", "bad"): 9,
    ("refused, truncated", "bad"): 11,
    ("refused, too many pixels", "bad"): 6,
    ("refused, not a picture in a known format", "bad"): 4,
    ("refused, empty file", "bad"): 2,
    ("ignored", "not_a_picture"): 3,
    ("ignored", "symlink"): 2,  # to nothing, and to its own folder
}
# What Pillow shows of these is not what they hold: values far beyond 8 bits, or a hidden grey.
BEYOND_8_BITS = {"10ct_32bit_128.tiff", "12bit.cropped.tif", "i_trns.png", "16bit.MM.deflate.tif"}
BEYOND_8_BITS |= {"gray16.png", "basi0g16.png"}
PEAK_MIB = 400  # measured 243: the picture of 100 megapixels needs 200


@pytest.fixture(scope="module")
def messy(test_data, tmp_path_factory):
    """A folder with the pack in ``messy``, its shards in ``shards``, the peak memory in MiB."""
    folder = tmp_path_factory.mktemp("messy")
    with tarfile.open(test_data / "messy.tar") as tar:
        tar.extractall(folder, filter="data")
    words = [PROGRAM, "messy", "shards", "--workers", "2"]
    code, errors, peak_mib = run_measured(words, folder, limit_s=120)
    assert code == 0, errors
    return folder, peak_mib


def verdicts_of(folder):
    """The manifest's verdict on each file, by its path in the pack."""
    with (folder / "messy" / "MANIFEST.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row["path"].removeprefix("messy/"): row["verdict"] for row in rows}


def outcomes_of(folder):
    """What became of each file that was not simply kept."""
    outcomes = {}
    for name, before in (("refused", "refused, "), ("changed", ""), ("ignored", "ignored")):
        for line in (folder / "shards" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            reason = row.get("reason", row.get("change")).partition(":")[0].partition(";")[0]
            outcomes[row["file"]] = before if before == "ignored" else before + reason
    return outcomes


def test_every_file_is_kept_transcoded_or_refused_by_the_table(messy):
    verdicts, outcomes = verdicts_of(messy[0]), outcomes_of(messy[0])
    found = Counter((outcomes.pop(name, "kept"), verdict) for name, verdict in verdicts.items())
    assert dict(found) == OUTCOMES
    assert list(outcomes) == ["MANIFEST.tsv"]
    accepted = [count for (outcome, _), count in OUTCOMES.items() if outcome[:3] in ("was", "kep")]
    assert read_manifest(messy[0] / "shards").samples == sum(accepted)


def test_the_peak_memory_of_any_process_stays_bounded(messy):
    assert 50 < messy[1] < PEAK_MIB


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow, of odd metadata
def test_all_that_was_accepted_decodes_in_dali_to_what_pillow_makes_of_it(messy, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    pytest.importorskip("nvidia.dali", reason="DALI has wheels for Linux only")
    pictures = list(stored(messy[0] / "shards"))
    assert len(pictures) == read_manifest(messy[0] / "shards").samples
    by_dali = decoded_by_dali([data for _, data, _ in pictures])
    for (key, data, size), ours in zip(pictures, by_dali, strict=True):
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        assert image.size == size and image.mode in ("RGB", "L"), key
        assert "progressive" not in image.info and image.getexif().get(0x0112, 1) == 1, key
        # In strips: one of them has 100 megapixels.
        for top in range(0, image.height, 500):
            rows = image.crop((0, top, image.width, min(top + 500, image.height))).convert("RGB")
            apart = ours[top : top + 500].astype(np.int16) - np.asarray(rows)
            assert np.abs(apart).max() <= 2, key


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_was_transcoded_still_shows_the_same_picture(messy, monkeypatch, keys_of):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    outcomes = outcomes_of(messy[0])
    names = [name for name in verdicts_of(messy[0]) if outcomes.get(name) != "ignored"]
    sources = {
        key: messy[0] / "messy" / name
        for key, name in zip(keys_of(names), names, strict=True)
        if outcomes.get(name, "").startswith("was")
    }
    far = {}
    for key, data, size in stored(messy[0] / "shards"):
        source = sources.get(key)
        if source is None or source.name in BEYOND_8_BITS or max(size) > 5000:
            continue
        with Image.open(source) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
        truth = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        ours = Image.open(io.BytesIO(data)).convert("RGB")
        assert ours.size == truth.size, source
        apart = np.abs(np.asarray(ours, np.int16) - np.asarray(truth, np.int16)).mean()
        if apart > 3.3:  # an icon of 4 x 4 pixels; photos lose one
            far[source.name] = apart
    assert far == {}
