import csv
import io
import json
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipeline.program import InputError
from pipeline.shard_format import read_manifest
from pipeline.shard_store import ShardStore
from pipeline.sources import SourceConfig
from pipeline.table_sources import list_source, table_source

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {"path": "pictures/0.jpg", "label": "bee", "author": "Ann", "year": 2001},
    {"path": "pictures/1.jpg", "label": "ant", "author": "Bob, Jr.", "year": 2002},
    {"path": "pictures/2.jpg", "label": "bee", "author": "", "year": 2003},
]


@pytest.fixture
def pictures(tmp_path, draw_photo, encode):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.jpg").write_bytes(encode(draw_photo(number)))
    return [(tmp_path / "pictures" / f"{number}.jpg").read_bytes() for number in range(3)]


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_gives_paths_labels_and_metadata(
    tmp_path, pictures, pack_source, samples_in, suffix
):
    output = pack_source(write_table(tmp_path / f"table{suffix}", ROWS))
    assert samples_in(output) == {
        f"pictures/{n}": (pictures[n], ROWS[n]["label"]) for n in range(3)
    }
    assert read_manifest(output).classes == ("ant", "bee")
    text = (output / "shard-000000.tar").read_bytes()
    year = '"2003"' if suffix in (".csv", ".tsv") else "2003"
    assert f'{{"year": {year}}}'.encode() in text and b'"author": "Bob, Jr."' in text


@pytest.mark.usefixtures("pictures")
def test_numbers_as_labels_are_kept_and_name_the_classes(tmp_path, pack_source):
    rows = [{"file": f"{n}.jpg", "target": n * 2} for n in range(3)]
    reading = SourceConfig(root=tmp_path / "pictures", path_column="file", label_column="target")
    output = pack_source(write_table(tmp_path / "t.csv", rows), reading=reading)
    assert read_manifest(output).classes == ("0", "1", "2", "3", "4")
    assert sorted(ShardStore(output).records(0)["label"].tolist()) == [0, 2, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file": "1.jpg"}], "row 1 of .* no text in the column 'path' .columns: file."),
        ([{"path": "a.jpg", "label": -1}], "row 1 .* has the label -1"),
        ([{"path": "a.jpg", "label": 2}, {"path": "b.jpg", "label": "x"}], "numbers .2. and names"),
        ([{"path": "pipe://ls"}], "1 of 1 pictures .* cannot be read"),
        ([{"path": "http://u:p@h/x.jpg"}], "leave user name"),
        ([{"path": "a.jpg", "label": 10**8}], "the label 100000000, the limit is"),
    ],
)
def test_a_wrong_table_is_an_input_error(tmp_path, pack_source, rows, message):
    with pytest.raises(InputError, match=message):
        pack_source(write_table(tmp_path / "t.jsonl", rows))


def test_a_broken_table_is_an_input_error(tmp_path, pack_source):
    (tmp_path / "t.jsonl").write_text('{"path": "a.jpg"}\n{"path"')
    with pytest.raises(InputError, match="cannot be read"):
        pack_source(tmp_path / "t.jsonl")
    with pytest.raises(InputError, match="does not exist"):
        table_source(tmp_path / "absent.csv", SourceConfig())


def test_urls_in_a_table_are_fetched(tmp_path, pictures, pack_source, samples_in):
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}/pictures"
        rows = [{"path": f"{base}/{name}.jpg", "label": "x"} for name in (0, 1, "absent")]
        output = pack_source(write_table(tmp_path / "t.jsonl", rows))
        server.shutdown()
    assert sorted(data for data, _ in samples_in(output).values()) == sorted(pictures[:2])
    (refused,) = (output / "refused.jsonl").read_text().splitlines()
    assert "cannot be fetched" in refused and "absent.jpg" in refused


def test_a_list_of_paths_comes_from_standard_input(tmp_path, pictures, samples_in):
    program = [sys.executable, ROOT / "pipeline" / "make_shards.py", "-", "out", "--workers", "1"]
    names = f"pictures/0.jpg\n{tmp_path}/pictures/2.jpg\n\npictures/none.jpg\n"
    done = subprocess.run(program, cwd=tmp_path, input=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = samples_in(tmp_path / "out")
    assert sorted(data for data, _ in found.values()) == sorted([pictures[0], pictures[2]])
    assert {label for _, label in found.values()} == {None}


def test_a_list_may_have_a_root():
    entries = list_source(io.StringIO("a b.jpg\n"), SourceConfig(root=Path("/data"))).entries
    assert [(entry.name, entry.path) for entry in entries] == [("a b.jpg", "/data/a b.jpg")]
