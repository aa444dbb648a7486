import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from pipeline.torch_views import (
    DecodeError,
    TorchEngine,
    decode,
    eval_picture,
    make_views,
    normalise,
    view_picture,
)
from pipeline.view_recipe import PAIRS, ViewRecipe, ViewRequest, draw_view

NORMALISATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BRIGHTNESS_CONTRAST_SATURATION_HUE = (
    TF.adjust_brightness,
    TF.adjust_contrast,
    TF.adjust_saturation,
    TF.adjust_hue,
)


def views_of(recipe, pictures, seed=0):
    sizes = np.array([picture.size for picture in pictures])
    return draw_view(recipe, sizes, (seed, 0, 0), np.arange(len(pictures)))


def request_of(name, pictures, seed=0):
    views = tuple(
        draw_view(
            recipe, np.array([p.size for p in pictures]), (seed, 0, v), np.arange(len(pictures))
        )
        for v, recipe in enumerate(PAIRS[name])
    )
    return ViewRequest([as_bytes(picture) for picture in pictures], views)


def as_bytes(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def crop_of(view, row, size):
    x, y, w, h = view.crop_xywh_px[row].tolist()
    return lambda picture: TF.resized_crop(picture, y, x, h, w, [size, size])


def jitter_of(view, row):
    chain = [
        (BRIGHTNESS_CONTRAST_SATURATION_HUE[operation], view.factors[row, operation])
        for operation in view.jitter_order[row]
    ]

    def jitter(picture):
        for adjust, factor in chain if view.jitter[row] else ():
            picture = adjust(picture, factor)
        return picture

    return jitter


def optional(happens, transform):
    return transform if happens else lambda picture: picture


@pytest.fixture(scope="module")
def photos(draw_photo):
    return [draw_photo(seed, 90 + seed, 120 - seed) for seed in range(24)]


def test_a_v1_view_is_the_official_chain_with_grey_before_the_jitter(photos):
    view = views_of(PAIRS["moco-v1"][0], photos)
    for row, picture in enumerate(photos):
        chain = T.Compose(
            [
                crop_of(view, row, 48),
                optional(view.grey[row], T.Grayscale(3)),
                jitter_of(view, row),
                optional(view.flip[row], TF.hflip),
            ]
        )
        assert chain(picture).tobytes() == view_picture(picture, view, row, 48).tobytes()
    assert view.grey.any() and view.jitter.any() and view.flip.any()


def test_a_v2_view_is_the_official_chain_with_grey_and_blur_after_the_jitter(photos):
    view = views_of(PAIRS["moco-v2"][0], photos)
    for row, picture in enumerate(photos):
        blur = ImageFilter.GaussianBlur(radius=float(view.sigma_px[row]))
        chain = T.Compose(
            [
                crop_of(view, row, 48),
                jitter_of(view, row),
                optional(view.grey[row], T.Grayscale(3)),
                optional(view.sigma_px[row] > 0, lambda picture, blur=blur: picture.filter(blur)),
                optional(view.flip[row], TF.hflip),
            ]
        )
        assert chain(picture).tobytes() == view_picture(picture, view, row, 48).tobytes()
    assert view.grey.any() and (~view.jitter).any() and (view.sigma_px > 0).any()


def test_a_v3_key_view_is_solarised_after_the_blur(photos):
    view = views_of(replace(PAIRS["moco-v3"][1], solarise_probability=1.0), photos, seed=5)
    for row, picture in enumerate(photos):
        before = view_picture(picture, replace(view, solarise=np.zeros(24, bool)), row, 48)
        expected = ImageOps.solarize(before, 128)  # official: PIL's default threshold
        assert view_picture(picture, view, row, 48).tobytes() == expected.tobytes()


def test_our_parameters_span_what_torchvisions_color_jitter_draws(photos):
    torch.manual_seed(0)
    transform = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = [
        transform.get_params(
            transform.brightness, transform.contrast, transform.saturation, transform.hue
        )
        for _ in range(4000)
    ]
    ours = views_of(PAIRS["moco-v2"][0], photos[:1] * 4000)
    for column in range(4):
        span = [draw[1 + column] for draw in theirs]
        factors = ours.factors[ours.jitter, column]
        assert (factors.min(), factors.max()) == pytest.approx((min(span), max(span)), abs=0.01)


def test_views_are_normalised_as_torchvision_does(photos):
    view = photos[0].resize((32, 32))
    expected = T.Normalize(*NORMALISATION)(T.ToTensor()(view))
    assert torch.allclose(normalise([view], *NORMALISATION)[0], expected, atol=1e-6)


def test_both_views_of_a_batch_have_the_promised_shape(photos):
    query, key = make_views(request_of("moco-v2", photos[:3]), 40, *NORMALISATION)
    assert query.shape == key.shape == (3, 3, 40, 40)
    assert query.dtype == torch.float32 and not torch.equal(query, key)


def test_the_grey_jpeg_becomes_three_equal_channels(photos):
    picture = decode(as_bytes(photos[0].convert("L")))
    assert picture.mode == "RGB" and len(set(picture.getpixel((9, 9)))) == 1


def test_the_rotation_in_exif_is_ignored_when_decoding(photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    photos[0].save(buffer, "JPEG", exif=exif)
    assert decode(np.frombuffer(buffer.getvalue(), np.uint8)).size == photos[0].size


def test_a_broken_picture_is_a_decode_error_and_named_by_its_row(photos):
    request = request_of("moco-v2", photos[:4])
    request.pictures[2] = np.frombuffer(b"\xff\xd8 not a picture", np.uint8)
    with pytest.raises(DecodeError, match="not a picture"):
        make_views(request, 32, *NORMALISATION)
    engine = an_engine(iter([]))
    assert list(engine.undecodable(request.pictures)) == [2]
    engine.close()


def an_engine(requests, half=False):
    return TorchEngine(
        lambda: next(requests),
        image_px=32,
        normalisation=NORMALISATION,
        device=torch.device("cpu"),
        half=half,
        threads=2,
    )


def test_the_engine_gives_the_views_of_its_requests_in_their_order(photos):
    requests = [request_of("moco-v2", photos[:3], seed) for seed in range(6)]
    engine = an_engine(iter(requests * 2))
    for request in requests:
        expected = make_views(request, 32, *NORMALISATION)
        assert all(torch.equal(a, b) for a, b in zip(engine.take(), expected, strict=True))
    engine.close()


def test_the_engine_goes_on_behind_a_broken_batch(photos):
    requests = [request_of("cifar10", photos[:2], seed) for seed in range(6)]
    requests[1].pictures[0] = np.zeros(9, np.uint8)
    engine = an_engine(iter(requests))
    engine.take()
    with pytest.raises(DecodeError):
        engine.take()
    expected = make_views(requests[2], 32, *NORMALISATION)[0]
    assert torch.equal(engine.take()[0], expected)
    engine.close()


def test_the_engine_gives_half_precision_on_request(photos):
    requests = [request_of("cifar10", photos[:2]) for _ in range(3)]
    engine = an_engine(iter(requests), half=True)
    assert engine.take()[0].dtype == torch.float16
    engine.close()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(photos, interpolation):
    mode = T.InterpolationMode(interpolation)
    chain = T.Compose([T.Resize(60, mode), T.CenterCrop(48)])
    shown = eval_picture(photos[3], 60, 48, interpolation)
    assert shown.tobytes() == chain(photos[3]).tobytes()


def test_a_view_of_a_plain_recipe_is_only_cropped(photos):
    recipe = ViewRecipe(crop_area=(0.2, 1.0), flip_probability=0.0)
    view = views_of(recipe, photos)
    expected = crop_of(view, 4, 40)(photos[4])
    assert view_picture(photos[4], view, 4, 40).tobytes() == expected.tobytes()
