"""Folders as nobody wants them, made by chance, and whether a packing of one is sound.

Real pictures and made ones of every format are damaged the way disks, networks, programs and
fuzzers do it, and lie among what else a file system can hold. ``tests/test_fuzz_packing.py`` packs
one, ``tests/bench/fuzz_packing.py`` as many as one likes.
"""

import io
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.shard_store import ShardStore

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "make_shards.py"
MOST_BYTES = 200_000  # of a file that is damaged
LEVELS = 2  # between DALI and Pillow
LOOK_S = 0.02
SUFFIXES = ("jpg", "JPG", "jpeg", "png", "PNG", "webp", "gif", "tif", "bmp", "ppm", "jp2", "avif")


def real_files(data, limit=400):
    """Bytes and endings of small real files, odd ones of ``messy.tar`` among them."""
    found = []
    for name in ("messy.tar", "imagenet_samples.tar", "voc_mini.tar", "coco_mini.tar"):
        if not (data / name).exists():
            continue
        with tarfile.open(data / name) as tar:
            members = [m for m in tar if m.isfile() and 0 < m.size < MOST_BYTES]
            members = members[:: max(1, len(members) // limit)]
            found += [(tar.extractfile(m).read(), Path(m.name).suffix or ".jpg") for m in members]
    return [(content, suffix) for content, suffix in found if suffix.lower()[1:] in SUFFIXES]


def made_files(rng):
    """Bytes and endings of drawn pictures in many forms of many formats."""
    rows = np.cumsum(rng.integers(-9, 10, (60, 83, 3)), axis=1) % 256
    scene = Image.fromarray(rows.astype(np.uint8))
    deep = Image.fromarray((rows[:, :, 0] * 257).astype(np.uint16))
    forms = [
        *(("JPEG", scene, {"progressive": True}), ("JPEG", scene, {"subsampling": 0})),
        *(("JPEG", scene.convert("CMYK"), {}), ("JPEG", scene.convert("L"), {})),
        *(("JPEG", scene, {"restart_marker_blocks": 2}), ("JPEG", scene, {"quality": 5})),
        *(("PNG", scene, {}), ("PNG", scene.convert("P"), {"transparency": 3}), ("PNG", deep, {})),
        *(("PNG", scene.convert("RGBA"), {}), ("PNG", scene.convert("1"), {})),
        *(("WEBP", scene, {}), ("WEBP", scene.convert("RGBA"), {"lossless": True})),
        *(("GIF", scene, {"save_all": True, "append_images": [scene.rotate(9)]}),),
        *(("TIFF", scene, {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate")),
        *(("TIFF", scene, {"compression": c}) for c in ("jpeg", "packbits")),
        *(("TIFF", scene.convert("1"), {"compression": "group4"}), ("TIFF", deep, {})),
        *(("BMP", scene, {}), ("BMP", scene.convert("P"), {}), ("PPM", scene, {})),
        *(("JPEG2000", scene, {}), ("AVIF", scene, {}), ("ICO", scene, {}), ("MPO", scene, {})),
    ]
    files = []
    for name, image, options in forms:
        with suppress(KeyError, OSError):  # a Pillow without this format
            output = io.BytesIO()
            image.save(output, name, **options)
            files.append((output.getvalue(), f".{name.lower()}"))
    return files


def bombs():
    """Small files that ask for much: pixels, memory, time."""
    sides = (struct.pack(">II", *size) for size in ((60_000, 60_000), (1, 2**31 - 1), (0, 9)))
    black = zlib.compress(bytes(30_000_000), 9)
    for side in sides:
        yield png((b"IHDR", side + b"\x08\x02\0\0\0"), (b"IDAT", black), (b"IEND", b"")), ".png"
    small = struct.pack(">II", 8, 8) + b"\x08\x02\0\0\0"
    pixels = zlib.compress(bytes(8 * 25))
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iCCP", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0")):
        yield png((b"IHDR", small), (kind, head + black), (b"IDAT", pixels), (b"IEND", b"")), ".png"
    yield png((b"IHDR", small), (b"IDAT", black), (b"IEND", b"")), ".png"
    yield b"\xff\xd8" + b"\xff\xe0\0\x02" * 100_000 + b"\xff\xd9", ".jpg"
    yield b"\xff\xd8" + b"\xff" * 1_000_000, ".jpg"
    yield b"GIF89a\x08\0\x08\0\0\0\0" + b"\x21\xfe\x01x\0" * 60_000, ".gif"
    loop = struct.pack("<2sHIH", b"II", 42, 8, 0) + struct.pack("<I", 8)  # a directory after itself
    yield loop, ".tif"
    many = b"".join(struct.pack("<HHII", 256 + n % 5, 4, 2**31, 8) for n in range(5000))
    yield struct.pack("<2sHIH", b"II", 42, 8, 5000) + many, ".tif"
    yield b"P6 50000 50000 255\n" + bytes(100), ".ppm"
    yield b"P6 " + b"9" * 5000 + b" 1 255\n", ".ppm"
    yield b"PK\x03\x04" + black, ".jpg"


def png(*chunks):
    """A PNG of these chunks, with true checksums."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        checked = kind + body
        parts += [struct.pack(">I", len(body)), checked, struct.pack(">I", zlib.crc32(checked))]
    return b"".join(parts)


def damaged(data, other, rng):
    """A file with what can happen to one; ``other`` is one that it may get mixed up with."""
    data, place = bytearray(data), int(rng.integers(0, len(data)))
    length = int(rng.integers(1, 5000))
    part = bytes(data[place : place + length])
    ways = {
        "bits": lambda: flipped(data, range(len(data)), rng),
        "header": lambda: flipped(data, range(min(len(data), 700)), rng),
        "short": lambda: data[: place + 1],
        "zeros": lambda: data[:place] + bytes(len(part)) + data[place + length :],
        "noise": lambda: data[:place] + rng.bytes(length) + data[place:],
        "mixed": lambda: data[:place] + other[min(place, len(other)) :],  # of a broken disk
        "twice": lambda: data[:place] + part * int(rng.integers(1, 4)) + data[place:],
        "sizes": lambda: sizes_changed(data, rng),
        "more": lambda: data + other[:length],
    }
    return bytes(ways[str(rng.choice(list(ways)))]()) or b"\0"


def flipped(data, places, rng):
    """Some bytes are others: of one bit, or of the values that programs stumble over."""
    for place in rng.choice(places, int(rng.integers(1, 30))).tolist():
        bit = data[place] ^ 1 << int(rng.integers(0, 8))
        data[place] = int(rng.choice([bit, bit, 0, 1, 0x7F, 0x80, 0xFE, 0xFF]))
    return data


def sizes_changed(data, rng):
    """Other numbers where a JPEG's or a PNG's width and height are."""
    sides = rng.choice([0, 1, 7, 64, 3000, 20_000, 65_535], 2).tolist()
    if data[:4] == b"\x89PNG" and len(data) > 33:
        data[16:24] = struct.pack(">II", *sides)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for marker in (b"\xff\xc0", b"\xff\xc2"):
        place = data.find(marker)
        if 0 < place < len(data) - 9:
            data[place + 5 : place + 9] = struct.pack(">HH", *sides)
    return data


def fill(folder, sources, count, rng):
    """Fill a new folder with ``count`` damaged pictures under odd names, and with odd files."""
    folder.mkdir()
    for number in range(count):
        (data, suffix), (other, _) = (sources[int(rng.integers(0, len(sources)))] for _ in range(2))
        if rng.random() < 0.9:
            data = damaged(data, other, rng)
        if rng.random() < 0.1:
            suffix = "." + str(rng.choice(SUFFIXES))
        write(folder, f"{odd_name(number, rng)}{suffix}".encode("utf-8", "surrogateescape"), data)
    for number, (data, suffix) in enumerate(bombs()):
        write(folder, f"bomb{number}{suffix}".encode(), data)
    add_odd_files(folder, rng)


def odd_name(number, rng):
    """A name of any characters that a file system takes."""
    odd = [
        "",
        "\n",
        "\udcff\udc80",
        " ",
        "'\"\\",
        "é",
        "e\u0301",
        "\u202e",
        "[red]",
        ".",
        "..",
        "-",
    ]
    name = f"{number}{rng.choice(odd)}x"
    if rng.random() < 0.1:
        name = f"{name}{'n' * 200}"
    return name if rng.random() < 0.7 else f"d{number % 7}{rng.choice(odd[3:])}/{name}"


def write(folder, name, data):
    """A file in a folder, which is made; names are bytes, as the system has them."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def add_odd_files(folder, rng):
    """What is no file, cannot be read, leads nowhere or round and round."""
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        # A socket's path has at most 108 characters: bound by a short one, then moved.
        short = f"/tmp/{os.getpid()}.socket"
        listener.bind(short)
        with suppress(OSError):
            Path(short).rename(folder / "socket.png")
        Path(short).unlink(missing_ok=True)
    with suppress(OSError):  # not as an ordinary user
        os.mknod(folder / "device.jpg", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    for name, target in (
        *(("zero.jpg", "/dev/zero"), ("nowhere.jpg", "no/where"), ("self.png", "self.png")),
        *(("a.jpg", "b.jpg"), ("b.jpg", "a.jpg"), ("round", "."), ("proc.jpg", "/proc/self/maps")),
    ):
        (folder / name).symlink_to(target)
    (folder / "folder.jpg").mkdir()
    (folder / "empty.jpg").touch()
    (folder / "no-ending").write_bytes(b"\xff\xd8\xff\xe0")
    deep = folder / "deep"
    for _ in range(40):
        deep = deep / ("d" * 20)
    deep.mkdir(parents=True)
    (deep / "below.jpg").write_bytes(rng.bytes(100))
    with (folder / "sparse.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(1 << 40)
    (folder / "locked.jpg").write_bytes(b"\xff\xd8\xff")
    (folder / "locked.jpg").chmod(0)
    for number, text in enumerate(
        (b"[" * 100_000, b'{"a": NaN, "\\ud800": 1e999}', b"\xff", b"{}")
    ):
        Image.new("RGB", (9, 9)).save(folder / f"car{number}.jpg")
        (folder / f"car{number}.json").write_bytes(text)


def run_measured(words, folder, limit_s):
    """Run a command; what it wrote as errors, and the peak memory of any of its processes in MiB.

    Workers are no children of the program, so they are looked at while they run.

    Raises:
        TimeoutError: if it takes longer than ``limit_s``; nothing of it runs any more then.
    """
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        end, peaks = time.monotonic() + limit_s, {0: 0}
        while process.poll() is None:
            peaks |= peaks_of_group(process.pid)
            time.sleep(LOOK_S)
            if time.monotonic() > end and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise TimeoutError(f"{words} in {folder}: more than {limit_s} s")
        errors.seek(0)
        return process.returncode, errors.read(), max(peaks.values()) / 1024


def peaks_of_group(group):
    """The highest memory so far, in KiB, of each process of a group."""
    peaks = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            if int((path / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                rows = (path / "status").read_text()
                peaks[int(path.name)] = int(rows.partition("VmHWM:")[2].split()[0])
    return peaks


def pack_and_check(folder, *, limit_s):
    """Pack ``folder/in`` into ``folder/shards`` and see that all of it was sound.

    Args:
        folder: holds ``in``.
        limit_s: after which it must have ended.

    Returns:
        Counts of the outcomes, the peak memory in MiB, and where DALI and Pillow differ.
    """
    words = [PROGRAM, "in", "shards", "--workers", "2", "--max-refused", "1", "--max-seconds", "20"]
    words += ["--max-pixels", "25000000"]  # larger ones may take 8 bytes for each, one at a time
    code, errors, peak_mib = run_measured(words, folder, limit_s)
    assert (code, errors) == (0, ""), errors
    rows = {
        name: [json.loads(line)["file"] for line in path.read_text().splitlines()]
        for name in ("refused", "changed", "ignored")
        if (path := folder / "shards" / f"{name}.jsonl").exists()
    }
    refused = (folder / "shards" / "refused.jsonl").read_text()
    outcome = Counter({name: len(files) for name, files in rows.items()})
    outcome["crashed"] = refused.count('"crashed its decoder"')
    outcome["took too long"] = refused.count("took too long")
    outcome["stored"] = sum(1 for _ in stored(folder / "shards"))
    files = [name for name in walked(folder / "in") if not name.endswith(".json")]
    assert len(files) == sum(outcome[name] for name in ("refused", "ignored", "stored"))
    return outcome, peak_mib, apart(folder / "shards")


def walked(folder):
    """Every file once, and links to folders."""
    for place, folders, files in os.walk(folder):
        yield from files
        yield from (name for name in folders if (Path(place) / name).is_symlink())


def stored(folder):
    """Keys, bytes and sizes of all pictures of a set."""
    store = ShardStore(folder)
    for shard in range(len(store.manifest.shards)):
        for index, record in enumerate(store.records(shard)):
            size = (int(record["width"]), int(record["height"]))
            yield store.key(shard, index), store.picture(shard, index).tobytes(), size


def apart(folder):
    """Which stored pictures are not the same in DALI and Pillow, and how far from it."""
    pictures, far = list(stored(folder)), {}
    for (key, data, size), ours in zip(
        pictures, decoded_by_dali([p[1] for p in pictures]), strict=True
    ):
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        if image.size != size or "progressive" in image.info or ours.shape[1::-1] != size:
            far[key] = f"{image.size} in Pillow, {size} in the index, {ours.shape} in DALI"
            continue
        most = int(np.abs(ours.astype(np.int16) - np.asarray(image.convert("RGB"))).max())
        if most > LEVELS:
            far[key] = f"{most} levels"
    return far


def decoded_by_dali(pictures):
    """What DALI makes of JPEGs on a CPU, one by one, decoded as for training."""
    from pipeline import dali_views  # DALI has wheels for Linux only

    waiting = iter(pictures)
    graph = dali_views.decode_graph(
        lambda: [[np.frombuffer(next(waiting), np.uint8)]],
        "cpu",
        **dali_views.pipeline_arguments(1, 1, torch.device("cpu"), prefetch=1),
    )
    graph.build()
    for _ in pictures:
        yield np.asarray(graph.run()[0].at(0))
