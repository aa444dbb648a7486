"""The converter as a command: every target loads where it belongs, with the same features."""

import contextlib
import io
import json
import pickle
import re
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from torch import nn

from eval.judged import foreign_encoder
from eval.weights_source import Choice, open_weights
from model.checkpoint import save_checkpoint
from model.encoder import EncoderConfig, make_backbone
from model.export import detectron2_content, detectron2_name, timm_arguments, torchvision_state
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.network_shape import WeightsError
from model.run_state import RunState
from model.weights import Weights, put_into, read_weights
from pipeline.data_config import DataConfig
from pipeline.program import InputError
from pipeline.settings import to_plain

ROOT = Path(__file__).resolve().parents[1]
PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def convert(*words):
    """What ``python eval/convert.py WORDS`` does, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert.py", *map(str, words)])
        patch.setattr("sys.path", [str(ROOT), *__import__("sys").path])
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / "eval" / "convert.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
    signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def converted(*words):
    done = convert(*words)
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(3)
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def official(resnet50, tmp_path_factory):
    """A checkpoint of MoCo v2 around that network, as query encoder."""
    head = {"fc.0.weight": torch.ones(2048, 2048), "fc.2.bias": torch.ones(128)}
    both = {"encoder_q": resnet50.state_dict() | head, "queue": torch.ones(128, 16)}
    flat = {f"module.{k}.{n}": t for k in ("encoder_q",) for n, t in both[k].items()}
    path = tmp_path_factory.mktemp("official") / "moco_v2_800ep_pretrain.pth.tar"
    torch.save({"epoch": 800, "arch": "resnet50", "state_dict": flat}, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ours: a ViT with the heads of MoCo v3 and other views than usual."""
    folder = tmp_path_factory.mktemp("run")
    network = EncoderConfig(backbone="vit_tiny_patch16_224", heads=12, dim=8)
    data = DataConfig(image_px=64, eval_resize_px=72, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.manual_seed(0)
    moco = MoCo(network, MoCoConfig(batch_norm_groups=4), global_batch=16, seed=0, image_px=64)
    moco.encoder_k.backbone.norm.bias.data.fill_(0.5)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1)
    config = {"encoder": network, "data": data, "moco": MoCoConfig(), "optimiser": DataConfig()}
    plain = {name: to_plain(value) for name, value in config.items()}
    plain |= {"seed": 0, "recipe": "moco-v3", "batch": 16, "precision": "no"}
    identity = {"config": plain, "data": {"samples": 1234, "manifest_sha256": "ab" * 32}}
    taken = RunState(moco, KeyQueue(8, 8, 0), optimizer, None).snapshot(3, identity)
    save_checkpoint(folder, taken.step, taken.tensors, taken.state)
    return folder, moco


@torch.no_grad()
def assert_same_features(network, expected, pictures=PICTURES):
    torch.testing.assert_close(network.eval()(pictures), expected.eval()(pictures))


def loaded(command):
    """What the ``timm.create_model`` command that the program prints gives."""
    return eval(re.search(r"timm\.create_model\(.*\)", command)[0], {"timm": timm})


def test_timm_loads_the_file_by_the_command_that_is_printed(official, resnet50, tmp_path):
    out = converted(official, tmp_path / "w.safetensors", "--to", "timm")
    assert "official MoCo v1 or v2, query encoder, resnet50, 318 tensors" in out
    assert_same_features(loaded(out), resnet50)


def test_timm_loads_a_run_of_ours_with_its_own_arguments(run, tmp_path):
    folder, moco = run
    for which, network in (("query", moco.encoder_q), ("key", moco.encoder_k)):
        path = tmp_path / f"{which}.safetensors"
        out = converted(folder, path, "--to", "timm", "--encoder", which)
        assert_same_features(loaded(out), network.backbone)


def test_torchvision_lacks_only_the_classifier(official, resnet50, tmp_path):
    converted(official, tmp_path / "w.pth", "--to", "torchvision")
    network = torchvision.models.resnet50()
    result = network.load_state_dict(
        torch.load(tmp_path / "w.pth", weights_only=True), strict=False
    )
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    network.fc = nn.Identity()
    assert_same_features(network, resnet50)


def from_detectron2(name):
    """The inverse of the names, written the other way round from the rules of the converter."""
    parts = name.split(".")
    if parts[0] == "stem":
        return ".".join(parts[1:]).replace("conv1.norm", "bn1")
    parts[0] = f"layer{int(parts[0].removeprefix('res')) - 1}"
    if parts[2] == "shortcut":
        parts[2:] = ["downsample", "1", *parts[4:]] if "norm" in parts else [
            "downsample", "0", *parts[3:]]  # fmt: skip
    elif "norm" in parts:
        parts[2:] = [parts[2].replace("conv", "bn"), *parts[4:]]
    return ".".join(parts)


def test_a_resnet_50_for_detectron2_has_318_arrays_that_lead_back(official, resnet50, tmp_path):
    out = converted(official, tmp_path / "w.pkl", "--to", "detectron2")
    assert "318 arrays" in out
    assert "[123.675, 116.280, 103.530]" in out
    content = pickle.loads((tmp_path / "w.pkl").read_bytes())
    assert content["__author__"] == "MOCO"
    assert content["matching_heuristics"] is True
    assert len(content["model"]) == 318
    network = torchvision.models.resnet50()
    network.fc = nn.Identity()
    network.load_state_dict({from_detectron2(n): torch.tensor(a) for n, a in
                             content["model"].items()})  # fmt: skip
    assert_same_features(network, resnet50)


def test_a_hub_folder_is_read_again_with_its_heads_and_pixel_statistics(run, tmp_path):
    folder, moco = run
    converted(folder, tmp_path / "hub", "--to", "hub")
    judged = foreign_encoder(tmp_path / "hub", Choice(), pytest.fail)
    assert_same_features(judged.network, moco.encoder_q.backbone)
    assert (judged.view.mean, judged.view.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "hub" / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(InputError, match=r"hub/config\.json is no config\.json of timm"):
        open_weights(tmp_path / "hub", Choice(), pytest.fail)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("layer1.0.conv1.weight", "res2.0.conv1.weight"),
        ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
        ("layer1.0.downsample.1.running_mean", "res2.0.shortcut.norm.running_mean"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
    ],
)
def test_names_of_detectron2_are_those_of_the_official_converter(name, theirs):
    assert detectron2_name(name) == theirs


def test_a_hub_folder_loads_with_timm_and_tells_its_story(run, tmp_path):
    folder, moco = run
    score = {"top1": 0.8125, "train_images": 50_000, "test_images": 10_000,
             "protocol": {"rule": "weighted kNN on frozen features", "k": [20],
                          "test_manifest_sha256": "cd" * 32}}  # fmt: skip
    (tmp_path / "knn.json").write_text(json.dumps(score))
    extra = ("--scores", tmp_path / "knn.json", "--license", "mit")
    out = converted(folder, tmp_path / "hub", "--to", "hub", *extra)
    network = loaded(out)
    assert_same_features(network, moco.encoder_q.backbone)
    assert network.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    assert network.num_classes == 0
    with_classes = timm.create_model(
        f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=5
    )
    assert with_classes(PICTURES).shape == (2, 5)
    card = (tmp_path / "hub" / "README.md").read_text()
    for part in ("library_name: timm", "license: mit", "value: 0.8125", "top-1 81.25%", "moco-v3",
                 "1,234 pictures", "abab", "mean [0.1, 0.2, 0.3]", '"k": [20]'):  # fmt: skip
        assert part in card, part
    files = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "hub").iterdir()} == files


def test_what_was_converted_can_be_read_again(official, resnet50, tmp_path):
    for name, target in (("w.safetensors", "timm"), ("w.pth", "torchvision")):
        converted(official, tmp_path / name, "--to", target)
        weights = read_weights(tmp_path / name)
        backbone = make_backbone(weights.network)
        put_into(backbone, weights)
        assert_same_features(backbone, resnet50)


def weights_of(**settings):
    config = EncoderConfig(**settings)
    with torch.device("meta"):
        tensors = make_backbone(config).state_dict()
    return Weights(tensors, config, 224, "x", {})


@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        (timm_arguments, {"backbone": "resnet18", "stem": "cifar"}, "timm builds no ResNet with"),
        (timm_arguments, {"backbone": "resnet50", "width": 2}, "2 times as wide"),
        (torchvision_state, {"backbone": "vit_tiny_patch16_224"}, "torchvision builds no vit_tiny"),
        (torchvision_state, {"backbone": "resnet50", "width": 2}, "of width 2"),
        (torchvision_state, {"backbone": "resnet18", "stem": "small"}, "3x3 stem 'small'"),
        (detectron2_content, {"backbone": "vit_tiny_patch16_224"}, "no backbone like vit_tiny"),
        (detectron2_content, {"backbone": "resnet18", "stem": "cifar"}, "3x3 stem 'cifar'"),
    ],
)
def test_what_the_other_side_cannot_build_is_refused(function, settings, message):
    with pytest.raises(WeightsError, match=message):
        function(weights_of(**settings))


def test_timm_builds_what_it_is_told_for_other_numbers_of_blocks_too():
    for settings in ({"backbone": "resnet18", "layers": (1, 1, 1, 1)},
                     {"backbone": "resnext50_32x8d"}):  # fmt: skip
        weights = weights_of(**settings)
        name, arguments = timm_arguments(weights)
        with torch.device("meta"):
            timm.create_model(name, **arguments).load_state_dict(weights.tensors)


def test_wrong_input_is_one_line_and_writes_nothing(official, tmp_path):
    (tmp_path / "taken.pth").write_text("")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    cases = [
        ((official, tmp_path / "w.bin", "--to", "timm"), "ends in .safetensors"),
        ((official, tmp_path / "taken.pth", "--to", "torchvision"), "exists already"),
        ((official, tmp_path / "no" / "w.pth", "--to", "torchvision"), "does not exist"),
        ((official, tmp_path / "w.pth", "--to", "torchvision", "--license", "mit"), "model card"),
        ((tmp_path / "none", tmp_path / "w.pth", "--to", "torchvision"), "is not a file"),
        ((tmp_path / "other.pth", tmp_path / "w.pth", "--to", "torchvision"), "no known project"),
        ((official, tmp_path / "w.pth", "--to", "torchvision", "--encoder", "key"), "key encoder"),
        ((official, tmp_path / "w.pth", "--to", "torchvision", "--from", "vissl"), "VISSL names"),
        ((official, tmp_path / "hub", "--to", "hub", "--scores", official), "is not JSON"),
        ((tmp_path, tmp_path / "w.pth", "--to", "torchvision"), "holds no checkpoint"),
    ]
    before = sorted(tmp_path.iterdir())
    for words, message in cases:
        done = convert(*words)
        assert done.code == 2, words
        assert message in done.err
        assert done.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_keeps_its_own_view(run):
    view = open_weights(run[0], Choice(), pytest.fail).view
    assert (view.resize_px, view.crop_px, view.mean) == (72, 64, (0.1, 0.2, 0.3))
