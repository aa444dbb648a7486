"""The vote of the nearest neighbours against a vote by hand."""

import contextlib
import io
import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from eval.features import LabelledFeatures, align_labels, extract
from eval.judged import pixels
from eval.knn import KnnConfig, KnnProtocol, choose, judge, knn_of_shards, knn_scores
from pipeline.eval_loader import EvalView
from pipeline.program import InputError
from pipeline.shard_format import read_manifest

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat", "dog")
VIEW = EvalView(
    resize_px=16, crop_px=16, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
)


def labelled(features, labels, classes=CLASSES):
    return LabelledFeatures(
        torch.as_tensor(features), torch.as_tensor(labels), tuple(classes), "sha256", 0
    )


def fifty_points():
    """50 training and 30 test points in four clouds that overlap."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(4, 6, generator=generator)
    train_label_M, test_label_N = torch.arange(50) % 4, torch.arange(30) % 4
    train_MF = centre[train_label_M] + torch.randn(50, 6, generator=generator)
    test_NF = centre[test_label_N] + torch.randn(30, 6, generator=generator)
    return labelled(train_MF, train_label_M), labelled(test_NF, test_label_N)


def votes_by_hand(train, point, k, protocol):
    """The summed votes of each class for one point, in Python's own floats."""
    rows = list(zip(train.features_NF.tolist(), train.label_N.tolist(), strict=True))
    length = math.dist(point, [0] * len(point)) if protocol.normalise else 1
    found = []
    for row, label in rows:
        product = sum(a * b for a, b in zip(row, point, strict=True))
        scale = length * math.dist(row, [0] * len(row)) if protocol.normalise else 1
        found.append((product / scale, label))
    nearest = sorted(found, reverse=True)[:k]
    votes = [0.0] * len(train.classes)
    for similarity, label in nearest:
        is_equal = protocol.weights == "equal"
        votes[label] += 1 if is_equal else math.exp(similarity / protocol.temperature)
    return votes


@pytest.mark.parametrize("weights", ["exp", "equal"])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("chunk_rows", [7, 1024])
def test_the_votes_are_those_of_a_count_by_hand(
    weights, normalise, temperature, chunk_rows, monkeypatch
):
    monkeypatch.setattr("eval.knn.CHUNK_ROWS", chunk_rows)
    protocol = KnnProtocol(
        k=(5, 1, 20, 50), temperature=temperature, weights=weights, normalise=normalise
    )
    train, test = fifty_points()
    scores = knn_scores(train.features_NF, train.label_N, test.features_NF, 4, protocol)
    for k, score_NC in scores.items():
        by_hand = [votes_by_hand(train, row.tolist(), k, protocol) for row in test.features_NF]
        shares = F.normalize(score_NC.double(), p=1, dim=1)  # votes count relative to each other
        expected = F.normalize(torch.tensor(by_hand, dtype=torch.double), p=1, dim=1)
        torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 20, 50])
def test_top_1_is_the_share_of_points_whose_class_gets_the_most_votes(k):
    protocol = KnnProtocol(k=(k,))
    train, test = fifty_points()
    right = 0
    for row, label in zip(test.features_NF, test.label_N, strict=True):
        votes = votes_by_hand(train, row.tolist(), k, protocol)
        right += votes.index(max(votes)) == label
    assert 0 < right < 30
    assert judge(train, test, protocol)["top1"] == pytest.approx(right / 30)


def test_a_k_above_the_number_of_training_pictures_counts_as_that_number():
    train, test = fifty_points()
    by_k = judge(train, test, KnnProtocol(k=(1000, 50)))["by_k"]
    assert by_k[1000] == by_k[50]


def test_the_first_k_gives_the_headline():
    train, test = fifty_points()
    result = judge(train, test, KnnProtocol(k=(1, 50)))
    assert result["k"] == 1
    assert {"top1": result["top1"], "top5": result["top5"]} == result["by_k"][1]
    assert result["by_k"][1] != result["by_k"][50]


def test_top_5_counts_the_five_classes_with_the_most_votes():
    features = torch.eye(7)
    classes = tuple("abcdefg")
    train = labelled(features, list(range(7)), classes)
    mixed = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]).expand(7, 7)
    result = judge(train, labelled(mixed, list(range(7)), classes), KnnProtocol(k=(7,)))
    assert result["top5"] == pytest.approx(5 / 7)
    assert result["top1"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("weights", ["exp", "equal"])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_the_classes_figures_sum_to_the_total(weights, k):
    train, test = fifty_points()
    result = judge(train, test, KnnProtocol(k=(k,), weights=weights))
    rows = result["per_class"].values()
    assert sum(row["images"] for row in rows) == 30
    right = sum(row["top1"] * row["images"] for row in rows)
    assert right == pytest.approx(result["top1"] * 30, abs=1e-4)


def test_the_classes_figures_sum_to_the_total_when_votes_are_even():
    classes = tuple("abcdefghij")
    train = labelled(torch.ones(10, 2), list(range(10)), classes)  # one vote for each class
    for label in range(10):
        test = labelled(torch.ones(3, 2), [label] * 3, classes)
        result = judge(train, test, KnnProtocol(k=(10,), weights="equal"))
        assert result["per_class"][classes[label]]["top1"] == result["top1"]


def test_classes_are_matched_by_name_in_any_order_and_number():
    train, test = fifty_points()
    expected = judge(train, test, KnnProtocol(k=(5,)))
    backwards = labelled(test.features_NF, 3 - test.label_N, CLASSES[::-1])
    assert judge(train, backwards, KnnProtocol(k=(5,))) == expected
    only = test.label_N == 2
    one_class = labelled(test.features_NF[only], test.label_N[only] * 0, ["cat"])
    result = judge(train, one_class, KnnProtocol(k=(5,)))
    assert result["per_class"] == {"cat": expected["per_class"]["cat"]}


def test_a_test_class_that_training_lacks_is_named():
    train, _ = fifty_points()
    test = labelled(torch.ones(2, 6), [0, 1], ["ant", "zebra"])
    with pytest.raises(InputError, match="classes that the training shards lack: zebra"):
        align_labels(train, test)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": ()}, "--protocol.k"),
        ({"k": (5, 0)}, "--protocol.k"),
        ({"temperature": 0.0}, "--protocol.temperature 0.0: give a number above 0"),
    ],
)
def test_a_protocol_out_of_range_is_named_with_its_flag(settings, message):
    with pytest.raises(InputError, match=message):
        KnnProtocol(**settings)


def test_shards_are_judged_with_the_whole_protocol_beside_the_figures(shard_set, tmp_path):
    result = knn_of_shards(
        pixels(VIEW), shard_set, shard_set, KnnProtocol(k=(1, 3)), device=CPU, batch=7
    )
    assert result["top1"] == 1.0  # each picture is its own nearest neighbour
    assert (result["train_images"], result["test_images"], result["skipped_images"]) == (40, 40, 0)
    protocol = result["protocol"]
    assert protocol["k"] == [1, 3]
    assert protocol["view"] == vars(VIEW)
    assert protocol["feature_dim"] == 16 * 16 * 3
    assert protocol["train_manifest_sha256"] == read_manifest(shard_set).sha256
    (tmp_path / "result.json").write_text(json.dumps(result))


def test_features_come_in_the_order_of_the_shards_and_in_any_batches(shard_set):
    whole = extract(pixels(VIEW), shard_set, device=CPU, batch=64)
    parts = extract(pixels(VIEW), shard_set, device=CPU, batch=7)
    assert whole.label_N.tolist() == [place % 3 for place in range(40)]
    assert whole.classes == ("ant", "bee", "cat")
    assert torch.equal(parts.label_N, whole.label_N)
    torch.testing.assert_close(parts.features_NF, whole.features_NF)


def test_a_damaged_picture_is_left_out_and_counted(own_set, flip_bit):
    flip_bit(own_set, 1, 4)
    found = extract(pixels(VIEW), own_set, device=CPU)
    assert (len(found.label_N), found.skipped) == (39, 1)
    assert found.label_N.tolist() == [place % 3 for place in range(40) if place != 13]


def test_a_network_is_judged_in_evaluation_mode_and_given_back_as_it_was(shard_set):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()).train()
    before = network[0].running_mean.clone()
    extract(type(pixels(VIEW))(network, VIEW, {}), shard_set, device=CPU)
    assert network.training
    assert torch.equal(network[0].running_mean, before)


def test_shards_without_labels_cannot_be_judged(tmp_path, pack_set, clean_pictures):
    folder = pack_set(tmp_path / "mixed", clean_pictures[:6], (6,))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "classes": []}))
    with pytest.raises(InputError, match="has no labels, so nothing can be judged with it"):
        extract(pixels(VIEW), folder, device=CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to judge: give a run, --weights FILE, --timm NAME or --pixels"),
        ({"weights": Path("w.pth"), "run": Path("run")}, "--timm and --weights are judged alone"),
        ({"timm": "resnet18", "pixels": True}, "--timm and --weights are judged alone"),
        ({"pixels": True, "json": Path("/nowhere/x.json")}, "--json /nowhere/x.json: its folder"),
        (
            {"pixels": True, "crop_px": 300},
            "crop.* 300 .* 256 .*--crop-px|--crop-px 300 .*--resize-px 256",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        choose(KnnConfig(train=tmp_path, test=tmp_path, **settings), pytest.fail)


def program(*words):
    """What ``python eval/knn.py WORDS`` does, in this process: its exit code, output and errors."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["knn.py", *map(str, words)])
        patch.setattr("sys.path", [*sys.path])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / "eval" / "knn.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.mark.parametrize("key_encoder", [False, True])
def test_the_program_judges_another_projects_checkpoint(key_encoder, shard_set, tmp_path):
    q, k = (timm.create_model("test_resnet", num_classes=0).state_dict() for _ in range(2))
    both = {f"encoder_q.{n}": t for n, t in q.items()} | {f"encoder_k.{n}": t for n, t in k.items()}
    torch.save({"state_dict": both, "epoch": 3}, tmp_path / "moco.pth")
    result = tmp_path / "result.json"
    sides = ("--resize-px", "32", "--crop-px", "32", "--device", "cpu", "--protocol.k", "1")
    sets = ("--train", shard_set, "--test", shard_set, "--json", result)
    which = ["--key-encoder"] if key_encoder else []
    foreign = ("--weights", tmp_path / "moco.pth", "--timm", "test_resnet")
    done = program(*foreign, *which, *sets, *sides)
    assert (done.code, done.err) == (0, "")
    judged = json.loads(result.read_text())["judged"]
    name = "key" if key_encoder else "query"
    assert judged["encoder"] == f"official MoCo v1 or v2, {name} encoder, test_resnet"
    assert judged["epoch"] == 3


def test_the_program_prints_and_writes_the_score_of_a_timm_network(shard_set, tmp_path):
    sides = ("--resize-px", "32", "--crop-px", "32", "--device", "cpu")
    result = tmp_path / "result.json"
    words = ("--train", shard_set, "--test", shard_set, "--json", result, *sides)
    done = program("--timm", "test_resnet", *words, "--protocol.k", "1")
    assert (done.code, done.err) == (0, "")
    assert "top-1 100.00% with 40 training and 40 test pictures" in done.out
    content = json.loads(result.read_text())
    assert content["top1"] == 1.0
    assert content["judged"]["backbone"] == "test_resnet"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is not a folder: give a run or one of its checkpoints"),
        (["--timm", "resnt50"], "timm has no backbone 'resnt50'"),
        (
            ["--timm", "test_resnet", "--weights", "nowhere"],
            "nowhere is not a file: give a checkpoint",
        ),
        (["--pixels", "--device", "gpu"], "--device gpu"),
        (["--pixels", "--device", "cuda:99"], "--device cuda:99"),
        (["--pixels", "--batch", "0"], "--batch 0"),
        (["--pixels", "--crop-px", "0"], "--crop-px"),
        (["--pixels", "--json", "."], "--json ."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_of_the_program_is_named_and_ends_with_code_2(
    words, message, shard_set, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = program("--train", shard_set, "--test", shard_set, *words)
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())
