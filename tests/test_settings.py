import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pipeline.program import InputError
from pipeline.settings import from_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class Data:
    shards: Path | None = None
    views: Literal["moco-v1", "moco-v2"] = "moco-v2"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    window: int = 131_072


@dataclass(frozen=True, kw_only=True)
class Train:
    data: Data = field(default_factory=Data)
    layers: tuple[int, ...] = (3, 4, 6, 3)
    lr: float = 0.03
    cosine: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"
    resume: str | None = None


def read(plain):
    return from_plain(Train, plain, "config.json")


def test_settings_survive_the_way_through_json():
    data = Data(shards=Path("/data/shards"), views="moco-v1", mean=(0.0, 0.5, 1.0))
    settings = Train(data=data, layers=(1, 1), lr=1e-3, cosine=False, resume="last")
    assert read(json.loads(json.dumps(to_plain(settings)))) == settings


def test_defaults_survive_the_way_through_json():
    again = read(json.loads(json.dumps(to_plain(Train()))))
    assert again == Train() and isinstance(again.layers, tuple)


def test_what_is_absent_keeps_its_default():
    assert read({"data": {"window": 5}}) == Train(data=Data(window=5))


def test_a_misspelt_key_is_an_error_that_offers_the_right_one_and_lists_all():
    message = r"config.json has no setting 'larers'; did you mean 'layers'\? Known: cosine, data, "
    with pytest.raises(InputError, match=message):
        read({"larers": [1, 1]})


def test_a_misspelt_key_deeper_down_is_named_with_its_place():
    with pytest.raises(InputError, match=r"config.json.data has no setting 'vievs'"):
        read({"data": {"vievs": "moco-v1"}})


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"lr": "fast"}, r"config.json.lr is 'fast', allowed: float"),
        ({"lr": True}, r"lr is True, allowed: float"),
        ({"data": {"window": 1.5}}, r"config.json.data.window is 1.5, allowed: int"),
        ({"data": {"window": True}}, r"window is True, allowed: int"),
        ({"cosine": 1}, r"cosine is 1, allowed: bool"),
        ({"precision": "fp8"}, r"precision is 'fp8', allowed: 'fp32', 'bf16'"),
        ({"layers": [1, "2"]}, r"layers is '2', allowed: int"),
        ({"layers": 3}, r"layers is 3, allowed: "),
        ({"data": {"mean": [0.5, 0.5]}}, r"mean is \[0.5, 0.5\], allowed: "),
        ({"data": {"mean": 0.5}}, r"mean is 0.5, allowed: "),
        ({"data": {"mean": None}}, r"mean is None, allowed: "),
        ({"data": {"shards": 7}}, r"shards is 7, allowed: "),
        ({"data": "here"}, r"config.json.data must be an object with settings, not 'here'"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_an_error_that_says_what_is_allowed(plain, message):
    with pytest.raises(InputError, match=message):
        read(plain)


def test_something_else_than_an_object_is_an_error():
    with pytest.raises(InputError, match=r"config.json must be an object with settings, not \[1\]"):
        read([1])


def test_a_setting_without_a_default_that_is_absent_is_an_error():
    needs = dataclasses.make_dataclass("Needs", [("width", int)], frozen=True)
    with pytest.raises(InputError, match="width"):
        from_plain(needs, {}, "protocol.json")


def test_whole_numbers_will_do_where_a_fraction_is_expected():
    assert read({"lr": 1}).lr == 1.0
