"""Checkpoints of other projects, made here by their own naming, give the same features."""

import argparse
import collections
import copy
import pickle
import subprocess

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from model.encoder import Encoder, EncoderConfig, make_backbone
from model.network_shape import WeightsError, network_of
from model.weights import named as named_network
from model.weights import put_into, read_weights

PICTURES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet(seed, name="resnet18"):
    """torchvision's network without its classifier, with running statistics of a trained one."""
    torch.manual_seed(seed)
    network = getattr(torchvision.models, name)()
    network.fc = nn.Identity()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def vit(seed, width=192, heads=3):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        img_size=64, patch_size=16, embed_dim=width, num_heads=heads, num_classes=0
    ).eval()


def head(features=512):
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128))


def named(**children):
    """A module with these children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def with_head(network, name):
    network = copy.deepcopy(network)
    setattr(network, name, head(192 if name == "head" else 512))
    return network


def wrapped(module):
    """The state of a module in ``DistributedDataParallel``, whose names begin with module."""
    return named(module=module).state_dict()


def official_v2(query, key):
    moco = named(encoder_q=with_head(query, "fc"), encoder_k=with_head(key, "fc"))
    moco.register_buffer("queue", torch.randn(128, 16))
    moco.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    parameters = list(moco.encoder_q.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    moco.load_state_dict(named(encoder_q=with_head(query, "fc"), encoder_k=with_head(key, "fc"))
                         .state_dict(), strict=False)  # fmt: skip
    return {"epoch": 200, "arch": "resnet18", "state_dict": wrapped(moco),
            "optimizer": optimizer.state_dict()}  # fmt: skip


def official_v3(query, key):
    name = "head" if hasattr(query, "blocks") else "fc"
    moco = named(base_encoder=with_head(query, name), momentum_encoder=with_head(key, name),
                 predictor=head(128))  # fmt: skip
    return {"epoch": 300, "arch": "vit", "state_dict": wrapped(moco), "scaler": {"scale": 65536.0}}


def mmselfsup_1(query, key):
    moco = named(backbone=query, neck=named(mlp=head()),
                 encoder_k=AveragedModel(nn.Sequential(key, named(mlp=head()))))  # fmt: skip
    return {"meta": {"epoch": 200}, "state_dict": moco.state_dict()}


def mmselfsup_0(query, key):
    encoder_q, encoder_k = (nn.Sequential(net, named(mlp=head())) for net in (query, key))
    moco = named(encoder_q=encoder_q, encoder_k=encoder_k, backbone=query, neck=encoder_q[1])
    return {"state_dict": moco.state_dict()}


def mmselfsup_v3(query, key):
    return {"state_dict": mm_vit(query, "backbone.") | mm_vit(key, "momentum_encoder.module.0.")
            | {"neck.fc0.weight": torch.ones(1)}}  # fmt: skip


def mm_vit(network, prefix):
    """A ViT by the names of mmcls: sequences in the feed-forward network, ln and projection."""
    new = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[0] = "layers"
            if parts[2] == "mlp":
                parts[2:4] = {"fc1": ["ffn", "layers", "0", "0"], "fc2": ["ffn", "layers", "1"]}[
                    parts[3]
                ]
            parts[2] = {"norm1": "ln1", "norm2": "ln2"}.get(parts[2], parts[2])
        elif parts[0] == "norm":
            parts[0] = "ln1"
        elif parts[0] == "patch_embed":
            parts[1] = "projection"
        new[prefix + ".".join(parts)] = tensor
    return new


def solo(query, key):
    moco = named(backbone=query, classifier=nn.Linear(512, 10), momentum_backbone=key,
                 projector=head(), momentum_projector=head())  # fmt: skip
    moco.register_buffer("queue", torch.randn(2, 256, 16))
    return {"epoch": 400, "state_dict": moco.state_dict(), "hyper_parameters": {"method": "x"}}


def solo_old(query, key):
    moco = named(encoder=query, momentum_encoder=key, projector=head(), momentum_projector=head())
    return {"state_dict": moco.state_dict()}


def vissl(query, key):
    def trunk(network):
        blocks = {n: m for n, m in network.named_children() if n not in ("relu", "fc")}
        return named(_feature_blocks=named(**blocks))

    loss = named(moco_encoder=named(trunk=trunk(key), heads=head()))
    loss.register_buffer("queue", torch.randn(128, 16))
    model = {"trunk": trunk(query).state_dict(), "heads": head().state_dict()}
    return {"classy_state_dict": {"base_model": {"model": model, "meta": {}},
                                  "loss": loss.state_dict()}, "iteration": 9}  # fmt: skip


def lightly(query, key):
    return named(backbone=query, projection_head=named(layers=head()), key_backbone=key,
                 key_projection_head=named(layers=head())).state_dict()  # fmt: skip


def lightly_sequential(query, key):
    first, second = (nn.Sequential(*list(net.children())[:-1]) for net in (query, key))
    return named(backbone=first, projection_head=named(layers=head()), backbone_momentum=second,
                 projection_head_momentum=named(layers=head())).state_dict()  # fmt: skip


def lightly_own(network):
    """lightly's own ResNet as a sequence: no layers between that have no tensors, shortcuts."""
    numbers = {
        name: str(n) for n, name in enumerate(("conv1", "bn1", *map("layer{}".format, range(1, 5))))
    }
    new = {"projection_head.0.weight": torch.ones(1)}
    for name, tensor in network.state_dict().items():
        first, _, rest = name.partition(".")
        new[f"backbone.{numbers[first]}.{rest}".replace("downsample", "shortcut")] = tensor
    return new


CHECKPOINTS = {
    "moco": official_v2,
    "moco-v3": official_v3,
    "mmselfsup": mmselfsup_1,
    "mmselfsup of version 0": mmselfsup_0,
    "solo-learn": solo,
    "solo-learn, old": solo_old,
    "vissl": vissl,
    "lightly": lightly,
    "lightly, sequential": lightly_sequential,
}


@pytest.fixture(scope="module")
def pair():
    return resnet(1), resnet(2)


def saved(content, folder, name="checkpoint.pth"):
    path = folder / name
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    return path


@torch.no_grad()
def features_of(weights, pictures=PICTURES):
    backbone = make_backbone(weights.network, weights.image_px)
    put_into(backbone, weights)
    return backbone.eval()(pictures)


@torch.no_grad()
def assert_same_features(weights, network):
    torch.testing.assert_close(features_of(weights), network(PICTURES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encoder", ["query", "key"])
@pytest.mark.parametrize("project", CHECKPOINTS)
def test_a_resnet_of_every_project_gives_its_own_features(project, encoder, pair, tmp_path):
    path = saved(CHECKPOINTS[project](*pair), tmp_path)
    weights = read_weights(path, encoder=encoder)
    assert_same_features(weights, pair[encoder == "key"])
    assert f"{encoder} encoder, resnet18" in weights.about


@pytest.mark.parametrize("encoder", ["query", "key"])
@pytest.mark.parametrize("project", [official_v3, mmselfsup_v3])
def test_a_vit_of_every_project_gives_its_own_features(project, encoder, tmp_path):
    pair = vit(1), vit(2)
    weights = read_weights(saved(project(*pair), tmp_path), encoder=encoder)
    assert (weights.network.backbone, weights.image_px) == ("vit_tiny_patch16_224", 64)
    assert_same_features(weights, pair[encoder == "key"])


def test_the_small_vit_of_moco_v3_has_twelve_heads_unless_told_otherwise(tmp_path):
    network = vit(1, width=384, heads=12)
    path = saved({"state_dict": wrapped(named(base_encoder=network))}, tmp_path)
    weights = read_weights(path)
    assert_same_features(weights, network)
    assert "12 attention heads" in weights.notes[0]
    assert read_weights(path, heads=6).network.heads == 6
    plain = read_weights(saved(network.state_dict(), tmp_path, "plain.pth"))
    assert plain.network.heads is None


@pytest.mark.parametrize("name", ["plain.pth", "plain.safetensors"])
def test_torchvision_and_timm_files_need_no_prefix(name, pair, tmp_path):
    content = pair[0].state_dict() | {"fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)}
    assert_same_features(read_weights(saved(content, tmp_path, name)), pair[0])


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_linear_checkpoint_and_one_in_a_container_are_plain_too(key, pair, tmp_path):
    content = {key: wrapped(with_head(pair[0], "fc")), "best_acc1": torch.tensor(71.1)}
    assert_same_features(read_weights(saved(content, tmp_path)), pair[0])


def test_names_without_the_wrapper_of_data_parallelism_are_accepted(pair, tmp_path):
    content = named(encoder_q=pair[0], encoder_k=pair[1]).state_dict()
    assert_same_features(read_weights(saved(content, tmp_path)), pair[0])


def test_counters_that_old_checkpoints_lack_are_zero(pair, tmp_path):
    content = {n: t for n, t in pair[0].state_dict().items() if not n.endswith("tracked")}
    weights = read_weights(saved(content, tmp_path))
    assert_same_features(weights, pair[0])
    assert int(weights.tensors["bn1.num_batches_tracked"]) == 0


def test_half_precision_is_widened(pair, tmp_path):
    content = {n: t.half() if t.is_floating_point() else t for n, t in pair[0].state_dict().items()}
    weights = read_weights(saved(content, tmp_path))
    assert weights.tensors["conv1.weight"].dtype == torch.float32
    torch.testing.assert_close(features_of(weights), pair[0](PICTURES), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("is_zip", [True, False])  # the authors' own files are of before torch 1.6
def test_a_checkpoint_says_its_epoch_and_architecture(is_zip, pair, tmp_path):
    path = tmp_path / "moco_v2.pth.tar"
    torch.save(official_v2(*pair), path, _use_new_zipfile_serialization=is_zip)
    weights = read_weights(path)
    assert weights.facts == {"epoch": 200, "arch": "resnet18"}
    assert weights.about == "official MoCo v1 or v2, query encoder, resnet18"


def test_a_small_stem_is_seen_and_solo_learns_padding_is_mentioned(tmp_path):
    network = make_backbone(EncoderConfig(backbone="resnet18", stem="cifar"))
    content = named(backbone=network, projector=head()).state_dict()
    weights = read_weights(saved(content, tmp_path))
    assert weights.network.stem == "cifar"
    assert "pads its 3x3 stem by 2" in weights.notes[0]


@pytest.mark.parametrize("name", ["encoder_k.safetensors", "encoder_k.pth"])
def test_the_encoder_file_of_a_checkpoint_of_ours_may_stand_alone(name, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(backbone="resnet18", dim=8)).eval()
    weights = read_weights(saved(encoder.state_dict(), tmp_path, name))
    assert_same_features(weights, encoder.backbone)
    assert weights.about.startswith("mocostream or a backbone alone, only encoder")


def test_lightlys_own_resnet_is_numbered_without_gaps(tmp_path):
    network = make_backbone(EncoderConfig(backbone="resnet18", stem="cifar")).eval()
    weights = read_weights(saved(lightly_own(network), tmp_path))
    assert weights.network == EncoderConfig(backbone="resnet18", stem="cifar")
    assert_same_features(weights, network)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(backbone=name)
        for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
                     "resnext50_32x4d", "resnext50_32x8d", "resnext101_32x8d", "wide_resnet50_2",
                     "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch32_224")
    ]
    + [
        EncoderConfig(backbone="resnet50", width=2),
        EncoderConfig(backbone="resnet50", width=4),
        EncoderConfig(backbone="resnet18", layers=(1, 1, 1, 1), stem="cifar"),
        EncoderConfig(backbone="resnet50", layers=(1, 2, 1, 1)),
    ],
    ids=lambda c: f"{c.backbone}-{c.width}-{c.layers}",
)  # fmt: skip
def test_the_shapes_tell_the_network(config):
    with torch.device("meta"):
        assert network_of(make_backbone(config).state_dict(), "x") == config


def test_a_network_is_named_with_what_differs_from_its_name():
    assert named_network(EncoderConfig(backbone="resnet50")) == "resnet50"
    small = EncoderConfig(backbone="resnet18", layers=(1, 1, 1, 1), stem="cifar")
    assert named_network(small) == "resnet18 of 1-1-1-1 blocks with a cifar stem"
    assert named_network(EncoderConfig(width=4)) == "resnet50 4 times as wide"


# What is refused ---------------------------------------------------------------------------------


def test_a_partial_backbone_is_refused_with_what_is_missing(pair, tmp_path):
    content = official_v2(*pair)
    for name in list(content["state_dict"]):
        if name.startswith(("module.encoder_q.layer4.1.bn2", "module.encoder_q.layer4.1.conv2")):
            del content["state_dict"][name]
    path = saved(content, tmp_path)
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert "5 are missing: layer4.1.conv2.weight, layer4.1.bn2.weight" in str(caught.value)
    read_weights(path, encoder="key")  # which is whole


def test_a_tensor_of_another_shape_or_name_is_refused(pair, tmp_path):
    content = pair[0].state_dict()
    content["layer3.0.conv2.weight"] = torch.ones(1, 1, 3, 3)
    content["layer3.0.se.weight"] = torch.ones(1)
    with pytest.raises(
        WeightsError, match=r"1 have another shape: layer3\.0\.conv2\.weight \(1, 1"
    ):
        read_weights(saved(content, tmp_path))
    with pytest.raises(WeightsError, match=r"1 are unknown: layer3\.0\.se\.weight"):
        read_weights(saved(content, tmp_path))


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"epoch": 3, "text": "hello"}])
def test_a_file_without_tensors_is_refused(content, tmp_path):
    with pytest.raises(WeightsError, match="0 tensors are named not at all"):
        read_weights(saved(content, tmp_path))


def test_a_foreign_network_is_refused_with_its_names(tmp_path):
    content = torchvision.models.squeezenet1_1().state_dict()
    with pytest.raises(WeightsError, match=r"no known project, its 52 tensors are named features"):
        read_weights(saved(content, tmp_path))


def test_a_checkpoint_without_key_encoder_says_so(pair, tmp_path):
    with pytest.raises(WeightsError, match="has no key encoder as torchvision or timm"):
        read_weights(saved(pair[0].state_dict(), tmp_path), encoder="key")
    with pytest.raises(WeightsError, match=r"no query encoder as VISSL names it .*_feature_blocks"):
        read_weights(saved(pair[0].state_dict(), tmp_path), origin="vissl")


def test_weights_are_not_put_into_another_network(pair, tmp_path):
    weights = read_weights(saved(pair[0].state_dict(), tmp_path))
    with pytest.raises(WeightsError, match="do not fit the network of this run"):
        put_into(make_backbone(EncoderConfig(backbone="resnet34")), weights)


class Malicious:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return subprocess.call, (["touch", self.marker],)


class Shell(Malicious):
    def __reduce__(self):
        return eval, (f"open({self.marker!r}, 'w').close()",)


@pytest.mark.parametrize("kind", [Malicious, Shell])
@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_never_runs(kind, is_zip, pair, tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    content = {"state_dict": pair[0].state_dict(), "extra": kind(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    try:
        read_weights(path)
    except WeightsError as error:
        assert "without running code" in str(error)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have
    assert marker.exists()


class Log:
    """As mmengine keeps its curves in a checkpoint."""

    def __init__(self, history):
        self._history = history
        self._methods = {"mean": np.mean}


def test_settings_and_logs_beside_the_weights_are_passed_over(pair, tmp_path):
    log = collections.OrderedDict(loss=Log(np.ones((3, 2))))
    content = {"state_dict": pair[0].state_dict(), "args": argparse.Namespace(lr=0.03), "log": log,
               "best_acc1": np.float64(71.1)}  # fmt: skip
    assert_same_features(read_weights(saved(content, tmp_path)), pair[0])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x02}q\x00.", b"hello\n" * 9])
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_garbage_is_one_line(content, name, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=str(path)) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_a_plain_pickle_and_a_folder_are_no_checkpoints(tmp_path):
    path = tmp_path / "d2.pkl"
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": [1.0]}}))
    with pytest.raises(WeightsError):
        read_weights(path)
    with pytest.raises(WeightsError, match="is not a file"):
        read_weights(tmp_path)
