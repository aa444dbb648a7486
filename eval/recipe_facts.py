"""What is known of each recipe from where it was published: data, scores, hours.

A number stands here only with its source; where none was published, nothing stands.
"""

from dataclasses import dataclass, replace

MOCO = "https://github.com/facebookresearch/moco (README)"
MOCO_V3 = "https://github.com/facebookresearch/moco-v3 (README, CONFIG.md)"
PAPER_V1 = "He et al. 2019, https://arxiv.org/abs/1911.05722"
PAPER_V2 = "Chen et al. 2020, https://arxiv.org/abs/2003.04297"
PAPER_V3 = "Chen et al. 2021, https://arxiv.org/abs/2104.02057"
NOTEBOOK = "the authors' CIFAR-10 notebook, colab/moco_cifar10_demo.ipynb"
DINO = "Caron et al. 2021, https://arxiv.org/abs/2104.14294, table 2"
MMSELFSUP = "mmselfsup, configs/selfsup"
ALIGN_UNIFORM = "https://github.com/SsnL/moco_align_uniform (README)"

LINEAR = "ImageNet, linear classifier on frozen features, top-1"
KNN = "ImageNet, weighted kNN by DINO's protocol, k 20, top-1"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a recipe is made for."""

    name: str
    pictures: int | None
    gigabytes: float | None = None
    """Packed; 10^9 bytes."""
    size: str = ""
    """Where the size is from."""
    pack: tuple[str, ...]
    """Commands that make TRAIN, and TEST with labels to judge with."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A published figure."""

    protocol: str
    value: str
    spread: str = "none published"
    source: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a card needs beside the settings."""

    what: str
    sources: tuple[str, ...]
    data: DataSet
    scores: tuple[Score, ...] = ()
    published_time: str = ""
    """Hours and on what, with the source."""
    measured_time: str = "not measured on a GPU yet"
    """With this project."""
    gpus: int = 1
    """Of the source; 1 where it names none."""
    notes: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    """All that is to be typed, where it is not packing, planning, training, judging."""


IMAGENET = DataSet(
    name="ImageNet-1k, training set",
    pictures=1_281_167,
    gigabytes=147.9,
    size="ILSVRC2012_img_train.tar; JPEGs keep their bytes",
    pack=(
        "python pipeline/make_shards.py ILSVRC2012_img_train.tar TRAIN",
        "python pipeline/make_shards.py ILSVRC2012_img_val.tar TEST \\",
        "    --labels ILSVRC2012_devkit_t12.tar.gz",
    ),
)
IMAGENET_100 = DataSet(
    name="ImageNet-100, the 100 classes of Contrastive Multiview Coding",
    pictures=126_689,
    gigabytes=14.6,
    size="its pictures' share of ImageNet's bytes, not measured",
    pack=(
        "python pipeline/make_shards.py IMAGENET100/train TRAIN",
        "python pipeline/make_shards.py IMAGENET100/val TEST",
    ),
)
CIFAR10 = DataSet(
    name="CIFAR-10, training set",
    pictures=50_000,
    pack=(
        "python pipeline/make_shards.py torchvision:CIFAR10:train TRAIN --root FOLDER",
        "python pipeline/make_shards.py torchvision:CIFAR10:test TEST --root FOLDER",
    ),
)
YOURS = DataSet(
    name="your pictures",
    pictures=None,
    pack=(
        "python pipeline/make_shards.py PICTURES TRAIN",
        "python pipeline/make_shards.py LABELLED_PICTURES TEST",
    ),
)

_V1 = Facts(
    what="MoCo v1: a queue of keys from a momentum encoder.",
    sources=(f"{PAPER_V1}, sections 3.3 and 4", MOCO),
    data=IMAGENET,
    scores=(
        Score(protocol=LINEAR, value="60.6", source=PAPER_V1),
        Score(protocol=LINEAR, value="60.8", spread="± 0.2, five runs", source=MOCO),
    ),
    published_time=f"53 hours on 8 V100, 424 GPU hours: {MOCO}",
    gpus=8,
)
_V2 = Facts(
    what="MoCo v2: v1 with an MLP head, more augmentation, a cosine schedule.",
    sources=(PAPER_V2, f"{MOCO}: --mlp --moco-t 0.2 --aug-plus --cos"),
    data=IMAGENET,
    scores=(
        Score(protocol=LINEAR, value="67.5", spread="± 0.1, five runs", source=MOCO),
        Score(protocol=KNN, value="55.7", source=f"{MMSELFSUP}/mocov2, their own training"),
    ),
    published_time=f"53 hours on 8 V100, 424 GPU hours: {MOCO}",
    gpus=8,
)
_V3 = Facts(
    what="MoCo v3 on a ResNet-50: no queue, a symmetric loss, a predictor, a batch of 4,096.",
    sources=(PAPER_V3, MOCO_V3),
    data=IMAGENET,
    gpus=16,
    notes=("The authors ran it on two machines of 8 V100 with 32 GB each.",),
)
_VIT = replace(
    _V3,
    what="MoCo v3 on a ViT of 12 heads whose patch projection stays as it starts.",
    gpus=32,
    notes=("The authors ran it on four machines of 8 V100 with 32 GB each.",),
)
_CIFAR10 = Facts(
    what="MoCo on CIFAR-10, small enough for one GPU.",
    sources=(NOTEBOOK,),
    data=CIFAR10,
    scores=(
        Score(
            protocol="CIFAR-10, weighted kNN of the head's 128 outputs, k 200, T 0.1, top-1",
            value="82.6",
            source=NOTEBOOK,
        ),
    ),
    published_time=f"about 22 s an epoch on a V100, 1.2 GPU hours: log of {NOTEBOOK}",
    notes=("eval/knn.py reads the backbone, not the head: its score is another one.",),
)

FACTS = {
    "moco-v1": _V1,
    "moco-v1-ig1b": replace(
        _V1,
        what="MoCo v1 on a billion pictures from Instagram, its length given in steps.",
        sources=(f"{PAPER_V1}, section 4",),
        data=replace(
            YOURS, name="about a billion pictures from Instagram, not public", pictures=940_000_000
        ),
        scores=(
            Score(
                protocol="VOC 07+12 detection, R50-C4, 24,000 steps: AP50, AP, AP75",
                value="82.2, 57.2, 63.7",
                source=PAPER_V1,
            ),
            Score(
                protocol="COCO, Mask R-CNN R50-FPN, 2x: box AP, mask AP",
                value="41.1, 37.4",
                source=PAPER_V1,
            ),
        ),
        published_time=f"about 6 days on 64 GPUs, 9,200 GPU hours: {PAPER_V1}, section 4",
        gpus=64,
        notes=("No ImageNet score was published.",),
    ),
    "moco-v2": _V2,
    "moco-v2-800": replace(
        _V2,
        what="MoCo v2 for 800 epochs.",
        scores=(
            Score(protocol=LINEAR, value="71.1", source=f"{PAPER_V2}; {MOCO}"),
            Score(protocol=KNN, value="61.9", source=DINO),
        ),
        published_time="",
    ),
    "imagenet-100": replace(
        _V2,
        what="MoCo v2 on a tenth of ImageNet: official code and settings, batch 128 on 4 GPUs.",
        sources=(f"{ALIGN_UNIFORM}: strong augmentation, MLP head, cosine; batch 128, rate 0.03",),
        data=IMAGENET_100,
        scores=(
            Score(
                protocol="ImageNet-100, linear classifier on frozen features, top-1",
                value="77.54",
                source=ALIGN_UNIFORM,
            ),
        ),
        published_time="",
        gpus=4,
        notes=(
            "The queue is half as long as the set, as in the source; the program says so.",
            "With batch 256 and rate 0.06 the source has 76.32.",
        ),
    ),
    "moco-v3-100": replace(
        _V3,
        scores=(
            Score(protocol=LINEAR, value="68.9", source=MOCO_V3),
            Score(protocol=LINEAR, value="69.6", source=f"{MMSELFSUP}/mocov3, their own training"),
        ),
    ),
    "moco-v3-300": replace(
        _V3,
        scores=(
            Score(protocol=LINEAR, value="72.8", source=MOCO_V3),
            Score(protocol=LINEAR, value="72.8", source=f"{MMSELFSUP}/mocov3, their own training"),
        ),
    ),
    "moco-v3-1000": replace(_V3, scores=(Score(protocol=LINEAR, value="74.6", source=MOCO_V3),)),
    "moco-v3-vit-s": replace(_VIT, scores=(Score(protocol=LINEAR, value="73.2", source=MOCO_V3),)),
    "moco-v3-vit-b": replace(
        _VIT,
        scores=(Score(protocol=LINEAR, value="76.7", source=MOCO_V3),),
        gpus=64,
        notes=("The authors ran it on eight machines of 8 V100.",),
    ),
    "cifar10": _CIFAR10,
    "cifar10-symmetric": replace(
        _CIFAR10,
        what="MoCo on CIFAR-10 with each view as the query of the other.",
        scores=(replace(_CIFAR10.scores[0], value="85.3"),),
        published_time="",
    ),
    "small-data": Facts(
        what="MoCo v2 on a ResNet-18, for some thousand to some hundred thousand pictures.",
        sources=("ours; batch and rate as in imagenet-100",),
        data=YOURS,
        notes=(
            "Queue and momentum follow from the number of pictures, by the rule in "
            "`eval/small_data.py`, which gives the published numbers for ImageNet and CIFAR-10; "
            "the start of a run prints them, `--moco.queue` and `--moco.momentum` win over them.",
            "Nothing was trained with it at length yet.",
        ),
    ),
    "demo": Facts(
        what="A small network on 5,000 handwritten digits, in minutes on a CPU.",
        sources=("ours",),
        data=DataSet(
            name="4,000 digits of MNIST, 1,000 to judge",
            pictures=4_000,
            pack=(),
        ),
        measured_time=(
            "not measured on a GPU yet; 2 min 58 s on two CPU cores, packing and judging included "
            "(README)"
        ),
        commands=("make demo",),
        scores=(
            Score(
                protocol="kNN of 1,000 digits, k 20, top-1; plain pixels 92.6, untrained 89.8",
                value="95.4",
                source="ours, README",
            ),
        ),
    ),
}
