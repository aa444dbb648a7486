"""The model card of a backbone on the Hugging Face hub: recipe, data, scores, how to load it."""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from eval.weights_source import Source

TASK = "image-feature-extraction"


def model_card(
    source: Source,
    settings: dict[str, Any],
    scores: list[dict[str, Any]],
    licence: str | None,
) -> str:
    """``README.md`` of a hub folder.

    Args:
        source: the backbone and the run that made it.
        settings: its ``config.json``.
        scores: results of eval programs, with their protocols.
        licence: as the hub abbreviates it; left out if None.
    """
    name = f"{settings['architecture']}-moco"
    data = ModelCardData(
        library_name="timm",
        tags=["timm", "moco", "self-supervised-learning", "feature-extraction"],
        pipeline_tag=TASK,
        license=licence,
        model_name=name,
        eval_results=[_result(score) for score in scores] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n# {name}",
        f"A {settings['architecture']} without classifier: {settings['num_features']} features of a"
        f" picture. Source: {source.weights.about}.",
        _usage(source),
        _recipe(source),
        _scores(scores),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(source: Source) -> str:
    view = source.view
    return (
        "## Use\n```python\nimport timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:NAME\n'
        "features = model(pictures)  # [N, 3, H, W] to [N, features]\n```\n"
        f"Pictures in RGB, in [0, 1], {view.crop_px} x {view.crop_px} (the middle of the shorter "
        f"side resized to {view.resize_px}), less the mean {list(view.mean)}, over "
        f"{list(view.std)}."
    )


def _recipe(source: Source) -> str:
    if not source.run:
        facts = "; ".join(f"{key} {value}" for key, value in source.weights.facts.items())
        return f"## Training\nNot known here beyond what the checkpoint says{_after(facts)}."
    config, data = source.run["config"], source.run["data"]
    rows = [
        ("recipe", config["recipe"]),
        ("steps", f"{source.run['step']:,} of {config['batch']} pictures"),
        ("data", f"{data['samples']:,} pictures, manifest {data['manifest_sha256']}"),
        ("method", _line(config["moco"])),
        ("optimiser", _line(config["optimiser"])),
        ("views", f"{config['data']['views']}, {config['data']['image_px']} px"),
        ("precision, seed", f"{config['precision']}, {config['seed']}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "## Training\nMomentum Contrast (https://arxiv.org/abs/1911.05722), with mocostream.\n\n"
        f"| | |\n|---|---|\n{table}"
    )


def _line(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)


def _after(facts: str) -> str:
    return f": {facts}" if facts else ""


def _scores(scores: list[dict[str, Any]]) -> str:
    if not scores:
        return ""
    parts = [
        f"- {score['protocol']['rule']}: **top-1 {score['top1']:.2%}**, {_about(score)}\n\n"
        f"      {json.dumps(score['protocol'])}"
        for score in scores
    ]
    return "## Scores, each with its protocol\n" + "\n".join(parts)


def _about(score: dict[str, Any]) -> str:
    train, test = (score.get(f"{part}_images", 0) for part in ("train", "test"))
    return f"{train:,} training and {test:,} test pictures"


def _result(score: dict[str, Any]) -> EvalResult:
    protocol = score["protocol"]
    identity = str(protocol.get("test_manifest_sha256", "unknown"))
    return EvalResult(
        task_type=TASK,
        dataset_type=identity,
        dataset_name=f"test set {identity[:12]}",
        metric_type="accuracy",
        metric_value=round(score["top1"], 4),
        metric_name=f"top-1, {protocol['rule']}",
    )
