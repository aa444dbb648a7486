"""The recipes: settings as they were published, or ours where it says so.

Sources: v1 https://arxiv.org/abs/1911.05722 sections 3.3 and 4, and the defaults of the official
main_moco.py; v2 https://arxiv.org/abs/2003.04297 and the flags --mlp --moco-t 0.2 --aug-plus
--cos; v3 https://arxiv.org/abs/2104.02057 and the commands of its official CONFIG.md; cifar10 the
authors' CIFAR-10 notebook; imagenet-100 the README of https://github.com/SsnL/moco_align_uniform,
which is the official code on that set. What is to be expected of each: ``docs/recipes``.
"""

from dataclasses import replace

from eval.run_config import TrainConfig
from model.encoder import EncoderConfig
from model.moco import MoCoConfig
from model.schedule import OptimiserConfig
from pipeline.data_config import DataConfig


def _v3_resnet(epochs: int, *, lr: float, weight_decay: float, momentum: float) -> TrainConfig:
    """MoCo v3 on a ResNet-50; its settings change with the length."""
    return TrainConfig(
        recipe=f"moco-v3-{epochs}",
        data=DataConfig(views="moco-v3"),
        encoder=EncoderConfig(backbone="resnet50", head="v3", dim=256, zero_init_residual=True),
        moco=_v3_moco(momentum=momentum, temperature=1.0),
        optimiser=OptimiserConfig(
            name="lars",
            lr=lr,
            lr_batch=256,
            weight_decay=weight_decay,
            every="step",
            warmup_epochs=10,
        ),
        batch=4096,
        epochs=epochs,
        precision="fp16",
    )


def _v3_vit(name: str, backbone: str) -> TrainConfig:
    """MoCo v3 on a ViT of 12 heads with frozen patch projection, 300 epochs."""
    return TrainConfig(
        recipe=name,
        data=DataConfig(views="moco-v3-vit"),
        encoder=EncoderConfig(backbone=backbone, heads=12, head="v3", dim=256),
        moco=_v3_moco(momentum=0.99, temperature=0.2),
        optimiser=OptimiserConfig(
            name="adamw", lr=1.5e-4, lr_batch=256, weight_decay=0.1, every="step", warmup_epochs=40
        ),
        batch=4096,
        epochs=300,
        precision="fp16",
    )


def _v3_moco(*, momentum: float, temperature: float) -> MoCoConfig:
    return MoCoConfig(
        mechanism="batch",
        momentum=momentum,
        momentum_schedule="cosine",
        temperature=temperature,
        symmetric=True,
        predictor=True,
        loss_2t=True,
        batch_norm="sync",
    )


_V1 = TrainConfig(
    recipe="moco-v1",
    data=DataConfig(views="moco-v1"),
    encoder=EncoderConfig(backbone="resnet50", head="linear"),
    moco=MoCoConfig(queue=65_536, momentum=0.999, temperature=0.07),
    optimiser=OptimiserConfig(lr=0.03, schedule="steps", milestones=(0.6, 0.8)),  # 120, 160
    batch=256,
    epochs=200,
)
_V2 = TrainConfig(
    recipe="moco-v2",
    data=DataConfig(views="moco-v2"),
    encoder=EncoderConfig(backbone="resnet50", head="mlp"),
    moco=MoCoConfig(queue=65_536, momentum=0.999, temperature=0.2),
    optimiser=OptimiserConfig(lr=0.03, schedule="cosine"),
    batch=256,
    epochs=200,
)
_CIFAR10 = TrainConfig(
    recipe="cifar10",
    data=DataConfig(
        views="cifar10",
        image_px=32,
        eval_resize_px=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    encoder=EncoderConfig(backbone="resnet18", stem="cifar", head="linear"),
    moco=MoCoConfig(queue=4096, momentum=0.99, temperature=0.1),
    optimiser=OptimiserConfig(lr=0.06, weight_decay=5e-4, schedule="cosine"),
    batch=512,
    epochs=200,
)

RECIPES = {
    "moco-v1": _V1,
    # A billion pictures from Instagram on 64 GPUs, which are as many groups of batch norm. The
    # length is given in steps; 1.4 epochs of 940 million pictures are the same.
    "moco-v1-ig1b": replace(
        _V1,
        recipe="moco-v1-ig1b",
        moco=replace(_V1.moco, batch_norm_groups=64),
        optimiser=OptimiserConfig(lr=0.12, schedule="decay", factor=0.9, decay_steps=62_500),
        batch=1024,
        epochs=1.4,
        steps=1_250_000,
    ),
    "moco-v2": _V2,
    "moco-v2-800": replace(_V2, recipe="moco-v2-800", epochs=800),
    # Four GPUs. The queue is half as long as the set, as in the source.
    "imagenet-100": replace(
        _V2, recipe="imagenet-100", moco=replace(_V2.moco, batch_norm_groups=4), batch=128
    ),
    "moco-v3-100": _v3_resnet(100, lr=0.6, weight_decay=1e-6, momentum=0.99),
    "moco-v3-300": _v3_resnet(300, lr=0.3, weight_decay=1e-6, momentum=0.99),
    "moco-v3-1000": _v3_resnet(1000, lr=0.3, weight_decay=1.5e-6, momentum=0.996),
    "moco-v3-vit-s": _v3_vit("moco-v3-vit-s", "vit_small_patch16_224"),
    "moco-v3-vit-b": _v3_vit("moco-v3-vit-b", "vit_base_patch16_224"),
    "cifar10": _CIFAR10,
    "cifar10-symmetric": replace(
        _CIFAR10, recipe="cifar10-symmetric", moco=replace(_CIFAR10.moco, symmetric=True)
    ),
    # Ours: the network and rates of small sets; queue and momentum come from the number of pictures
    # (eval/small_data.py), these two stand for 12,288 of them. Rate and batch as in imagenet-100.
    "small-data": replace(
        _V2,
        recipe="small-data",
        encoder=EncoderConfig(backbone="resnet18", head="mlp"),
        moco=replace(_V2.moco, queue=1024, momentum=0.99, batch_norm_groups=4),
        batch=128,
        epochs=400,
    ),
    # Ours: a network and a queue small enough for minutes on a CPU and for a few hundred pictures.
    "demo": TrainConfig(
        recipe="demo",
        data=DataConfig(
            views="marks",
            image_px=32,
            eval_resize_px=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        encoder=EncoderConfig(backbone="resnet18", layers=(1, 1, 1, 1), head="mlp"),
        moco=MoCoConfig(queue=512, momentum=0.99, temperature=0.1, batch_norm_groups=4),
        # 0.06 collapsed within four epochs: the loss went to log(K + 1), kNN stood still.
        optimiser=OptimiserConfig(lr=0.015, weight_decay=5e-4),
        batch=64,
        epochs=30,
        save_every=500,
    ),
}

# Whose queue and momentum follow from the number of pictures.
FITTED = frozenset({"small-data"})
