"""What this project promises, one test a promise, in the order of its files: data, models, losses, the program.

    python -m pytest                     everything quick, about 80 seconds
    SLOW=1 python -m pytest              also twenty kills, a thousand damaged files and a real training
    python test_inpaint.py               no tests: how fast all of it is on this machine, as a table
    pytest -v                            reads as the list of promises

Tests that use CelebA look for it at ../shared/celeba and skip without it.
"""

import csv
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import data
import inpaint
import losses
import models
from data import InputError

HERE = Path(__file__).parent
CELEBA = HERE.parent / "shared" / "celeba" / "img_align_celeba.zip"
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")
needs_celeba = pytest.mark.skipif(not CELEBA.exists(), reason="needs the shared pictures")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")
TINY = ["--res", "32", "--width", "4", "--depth", "3", "--batch", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test has a working directory of its own and a small built-in data set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SYNTHETIC", 40)
    return tmp_path


@pytest.fixture(scope="session")
def faces():
    """24 drawn faces, float (24, 3, 64, 64)."""
    return data.synthetic_faces(24, 64, 1).float() / 255


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished small run of a U-Net."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SYNTHETIC", 40)
        inpaint.main(["--epochs", "2", "--out", str(folder / "run"), *TINY])
    return folder / "run"


def write_photos(folder, count=12, size=96, suffix=".jpg"):
    """Drawn faces as picture files 000.jpg, 001.jpg, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, face in enumerate(data.synthetic_faces(count, size, 3)):
        data.to_picture(face).save(folder / f"{i:03d}{suffix}", quality=92)
    return folder


def command(*argv):
    """main(argv) -> its exit code."""
    try:
        inpaint.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


def read_csv(path):
    """The rows of a table as dictionaries."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def options_for(model="unet", **changed):
    """The options that the command line would make, for a small network."""
    args = inpaint.parser().parse_args(["--model", model, *TINY])
    return inpaint.training_options(args) | changed


# === data.py: the hole ============================================================================


@pytest.mark.parametrize("res, side, corner", [(64, 19, 22), (128, 38, 45), (32, 10, 11), (256, 77, 89)])
def test_the_hole_is_a_centred_square_of_30_percent_of_the_side(res, side, corner):
    mask = data.center_hole(res, 0.3)
    assert mask.shape == (1, 1, res, res) and mask.sum() == side**2
    assert mask[0, 0, corner : corner + side, corner : corner + side].all()


def test_damage_is_white_in_the_hole_and_changes_nothing_else(faces):
    mask = data.center_hole(64, 0.3)
    damaged = data.damage(faces, mask)
    assert (damaged[:, :, 22:41, 22:41] == 1).all()
    assert torch.equal(damaged * (1 - mask), faces * (1 - mask))


def test_random_holes_lie_inside_vary_and_are_central_half_of_the_time():
    boxes = data.random_boxes(2000, 64, 0.3, torch.Generator().manual_seed(0))
    top, left, bottom, right = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (bottom <= 64).all() and (right <= 64).all()
    assert (bottom > top).all() and (right > left).all()
    central = (boxes == data.center_box(64, 0.3)).all(1).float().mean()
    assert 0.45 < central < 0.55
    assert len(boxes.unique(dim=0)) > 800
    masks = data.box_mask(boxes, 64)
    assert torch.equal(masks.sum((1, 2, 3)).long(), (bottom - top) * (right - left))


# === data.py: reading pictures ====================================================================


def picture(mode, size=(40, 40)):
    """A left-to-right ramp from black to white in a mode of Pillow."""
    ramp = np.linspace(0, 1, size[0])[None].repeat(size[1], 0)
    if mode == "I;16":
        return Image.fromarray((ramp * 65535).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray((ramp * 65535).astype(np.int32) if mode == "I" else ramp.astype(np.float32))
    grey = Image.fromarray((ramp * 255).astype(np.uint8))
    return grey.convert("RGB").convert(mode) if mode in ("CMYK", "P", "RGBA") else grey.convert(mode)


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "png"), ("1", "png"), ("LA", "png"), ("RGB", "bmp"), ("RGBA", "png"), ("P", "gif"), ("CMYK", "jpg"),
     ("I;16", "png"), ("I", "tif"), ("F", "tif"), ("YCbCr", "jpg")],
)  # fmt: skip
def test_every_mode_of_pillow_becomes_rgb_scaled_and_not_clipped(mode, suffix, tmp_path):
    picture(mode).save(tmp_path / f"ramp.{suffix}")
    pixels = data.load_images(tmp_path, 32)[0].float()
    assert pixels.shape == (3, 32, 32)
    if mode != "1":
        assert abs(pixels[:, :, 16].mean() - 131) < 12, "the middle of the ramp must stay grey"
    assert pixels[:, :, 0].mean() < 40 and pixels[:, :, -1].mean() > 215


def test_exif_orientation_turns_the_picture_upright(tmp_path):
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (0, 0, 60, 20))
    turned = image.rotate(90, expand=True)  # stored lying on its side ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... and told to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = data.load_images(tmp_path, 32)[0].float()
    assert pixels[:, :12].mean() > 240 and pixels[:, 20:].mean() < 15


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert data.load_images(tmp_path, 32)[0].float().mean((1, 2)).round().tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (3, 500), (33, 32)])
def test_pictures_of_odd_sizes_become_squares(size, tmp_path):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "odd.png")
    pixels = data.load_images(tmp_path, 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels[0].float().mean((1, 2)).tolist() == [10, 200, 30]


def test_the_central_square_is_cut_out(tmp_path):
    image = Image.new("RGB", (300, 100), "black")
    image.paste("white", (100, 0, 200, 100))
    image.save(tmp_path / "wide.png")
    assert data.load_images(tmp_path, 32).float().mean() > 254


def test_folders_and_zips_are_searched_to_the_bottom_and_litter_is_passed_over(tmp_path):
    names = ["b.jpg", "a/ä ö.png", "a/c/日本.JPG", "z 1.webp"]
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), "red").save(tmp_path / "d" / name)
    (tmp_path / "d" / "__MACOSX").mkdir()
    for litter in ("__MACOSX/b.jpg", ".hidden.jpg", "notes.txt", "a/list.csv"):
        (tmp_path / "d" / litter).write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for file in (tmp_path / "d").rglob("*"):
            archive.write(file, file.relative_to(tmp_path))
    found = [name for name, *_ in data.list_pictures(tmp_path / "d")]
    assert found == sorted(names)
    assert [name for name, *_ in data.list_pictures(tmp_path / "d.zip")] == sorted(f"d/{name}" for name in names)
    assert torch.equal(data.load_images(tmp_path / "d", 32), data.load_images(tmp_path / "d.zip", 32))


def test_reduced_jpeg_decoding_is_used_and_differs_by_less_than_a_level(tmp_path, monkeypatch):
    files = []
    for i, face in enumerate(data.synthetic_faces(8, 178, 5)):
        tall = data.to_picture(F.pad(face[None].float(), (0, 0, 20, 20), mode="replicate")[0].to(torch.uint8))
        tall.save(tmp_path / f"{i}.jpg", quality=90)
        files.append(tmp_path / f"{i}.jpg")
    sizes = []
    square = data.central_square
    monkeypatch.setattr(data, "central_square", lambda image, res: sizes.append(image.size) or square(image, res))
    fast = data.load_images(tmp_path, 64).float()
    assert set(sizes) == {(89, 109)}, "a 178 x 218 JPEG must be decoded at half its size for 64 px"
    full = torch.stack([data.to_tensor(square(Image.open(file).convert("RGB"), 64)) for file in files]).float()
    assert (fast - full).abs().mean() < 1


def test_broken_pictures_in_a_large_data_set_are_left_out_and_named_once(tmp_path, capsys):
    write_photos(tmp_path / "d", 60, 24)
    (tmp_path / "d" / "007.jpg").write_bytes(b"not a jpeg")
    (tmp_path / "d" / "050.jpg").write_bytes((tmp_path / "d" / "051.jpg").read_bytes()[:300])
    whole = [i for i in range(60) if i not in (7, 50)]
    images = data.load_images(tmp_path / "d", 32)
    told = capsys.readouterr().err
    assert len(images) == 58 and "2 of 60" in told and "007.jpg" in told and "050.jpg" in told
    direct = [data.to_tensor(data.central_square(data.open_photo(tmp_path / "d" / f"{i:03d}.jpg", 32), 32)) for i in whole]
    assert torch.equal(images, torch.stack(direct))
    assert len(data.load_images(tmp_path / "d", 32)) == 58 and capsys.readouterr().err == ""


def test_several_processes_decode_to_the_same_bytes_as_one(tmp_path, monkeypatch):
    write_photos(tmp_path / "d", 200, 32, ".png")
    one = data.load_images(tmp_path / "d", 32, "cache1").clone()
    listed = data.list_pictures
    monkeypatch.setattr(data, "list_pictures", lambda path: [(name, 1 << 20, when) for name, _, when in listed(path)])
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert torch.equal(data.load_images(tmp_path / "d", 32, "cache3"), one)


# === data.py: the cache ===========================================================================


def cache_file(folder="cache"):
    return next(Path(folder).glob("*.u8"))


def test_the_second_load_comes_from_the_cache_alone(tmp_path, monkeypatch):
    write_photos(tmp_path / "d")
    first = data.load_images(tmp_path / "d", 32).clone()
    monkeypatch.setattr(data, "decode", None)
    assert torch.equal(data.load_images(tmp_path / "d", 32), first)


@pytest.mark.parametrize("harm", ["cut", "foreign", "empty", "grown", "of another data set"])
def test_a_cache_that_is_not_whole_and_right_is_made_anew(harm, tmp_path):
    write_photos(tmp_path / "d")
    first = data.load_images(tmp_path / "d", 32).clone()
    file = cache_file()
    whole = file.read_bytes()
    other = bytearray(whole)
    other[-5] ^= 1
    file.write_bytes(
        {"cut": whole[:-3072], "foreign": os.urandom(len(whole)), "empty": b"", "grown": whole + whole, "of another data set": bytes(other)}[harm]
    )
    assert torch.equal(data.load_images(tmp_path / "d", 32), first)
    assert cache_file().read_bytes() == whole


def test_a_changed_file_makes_the_cache_stale(tmp_path):
    write_photos(tmp_path / "d")
    first = data.load_images(tmp_path / "d", 32).clone()
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "d" / "003.jpg")
    second = data.load_images(tmp_path / "d", 32)
    assert not torch.equal(first[3], second[3]) and torch.equal(first[4], second[4])
    assert len(list(Path("cache").iterdir())) == 1, "one cache for a data set and resolution"


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    write_photos(tmp_path / "d")
    Path("cache").write_text("a file is in the way")
    assert data.load_images(tmp_path / "d", 32).shape == (12, 3, 32, 32)
    assert "warning: no cache" in capsys.readouterr().err


def test_the_split_is_by_name_order():
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None]
    training, validation = data.split(images, 0.2)
    assert training.flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and validation.flatten().tolist() == [8, 9]


# === data.py: drawn faces, batches, pictures ======================================================


def test_synthetic_faces_are_the_same_for_a_seed_and_differ_between_faces():
    first = data.synthetic_faces(20, 64, 0)
    assert torch.equal(first, data.synthetic_faces(20, 64, 0))
    assert not torch.equal(first, data.synthetic_faces(20, 64, 1))
    assert first.dtype == torch.uint8 and first.shape == (20, 3, 64, 64)
    assert (first[1:].float() - first[:-1].float()).abs().mean((1, 2, 3)).min() > 5


def test_what_the_hole_hides_follows_from_the_rest_but_not_all_of_it():
    pixels = data.synthetic_faces(1500, 32, 0).float() / 255
    hole = data.center_hole(32, 0.3).expand(1500, 3, 32, 32) > 0
    inside, known = pixels[hole].view(1500, -1).double(), pixels[~hole].view(1500, -1).double()
    train, test = slice(0, 1200), slice(1200, 1500)
    centre_x, centre_y = known[train].mean(0), inside[train].mean(0)
    kernel = (known - centre_x) @ (known[train] - centre_x).T  # ridge regression, in its dual form
    guess = kernel[test] @ torch.linalg.solve(kernel[train] + 30 * torch.eye(1200), inside[train] - centre_y) + centre_y
    explained = 1 - (guess - inside[test]).square().mean() / (inside[test] - centre_y).square().mean()
    assert 0.5 < explained < 0.97


def test_batches_hold_every_picture_once_in_the_given_order_mirrored_where_asked(faces):
    pixels = (faces * 255).round().to(torch.uint8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    flip = torch.arange(24) % 2 == 0
    images = torch.cat(list(data.batches(pixels, 8, order, flip, CPU)))
    assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
    expected = pixels[order].float() / 255
    expected[flip] = expected[flip].flip(3)
    assert torch.equal(images, expected)


def test_half_of_the_pictures_of_an_epoch_are_mirrored():
    flip = inpaint.draw_epoch(options_for(), 0, 1000, 1000)[1]
    assert 0.4 < flip.float().mean() < 0.6


def test_processes_share_an_epoch_without_overlap_and_each_epoch_is_shuffled_anew(monkeypatch):
    parts = []
    for rank in range(3):
        monkeypatch.setattr(inpaint, "rank_and_world", lambda rank=rank: (rank, 3))
        parts.append(inpaint.draw_epoch(options_for(), 0, 30, 10)[0].tolist())
    assert sorted(itertools.chain(*parts)) == list(range(30))
    monkeypatch.setattr(inpaint, "rank_and_world", lambda: (0, 3))
    assert inpaint.draw_epoch(options_for(), 1, 30, 10)[0].tolist() != parts[0]


def test_a_grid_shows_its_pictures_pixel_by_pixel(faces):
    sheet = data.grid([("damaged", faces[:3]), ("original", faces[3:6])])
    pixels = np.asarray(sheet)
    face = np.asarray(data.to_picture(faces[5]).resize((128, 128), Image.Resampling.NEAREST))
    assert (pixels[-132:-4, -132:-4] == face).all()
    assert sheet.width > 3 * 128 and (pixels[:, :40] < 128).any(), "the labels are written at the left"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data.save(tmp_path / "f", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        data.save(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# === models.py ====================================================================================


def test_swish_is_x_times_sigmoid_and_agrees_with_torch():
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    expected = x.numpy() / (1 + np.exp(-x.numpy()))
    assert np.allclose(models.Swish()(x).numpy(), expected, atol=1e-15)
    assert torch.allclose(models.Swish()(x), F.silu(x))


@pytest.mark.parametrize("act", ["relu", "swish"])
@pytest.mark.parametrize("res, depth", [(32, 1), (32, 5), (64, 4), (64, 6), (128, 5), (256, 5)])
def test_the_unet_paints_a_picture_of_the_same_size_between_0_and_1(res, depth, act):
    output = models.UNet(depth, 4, act)(torch.rand(2, 3, res, res), data.center_hole(res, 0.3))
    assert output.shape == (2, 3, res, res) and output.dtype == torch.float32
    assert 0 <= output.min() and output.max() <= 1


def test_the_unet_has_the_activation_it_was_asked_for():
    for act, kind, other in (("relu", torch.nn.ReLU, models.Swish), ("swish", models.Swish, torch.nn.ReLU)):
        kinds = [type(layer) for layer in models.UNet(4, 4, act).modules()]
        assert kinds.count(kind) == 7 and other not in kinds


def test_every_level_of_the_unet_has_a_skip():
    network = models.UNet(5, 8, "relu")
    assert [step[0].in_channels for step in network.up] == [128, 128, 64, 32] and network.paint.in_channels == 16
    assert [step[0].out_channels for step in network.up] == [64, 32, 16, 8] and network.keep.in_channels == 4


def test_the_mask_tells_a_white_hole_from_a_white_wall():
    network = models.UNet(3, 4, "relu").eval()
    white = torch.ones(1, 3, 32, 32)
    assert not torch.allclose(network(white, torch.zeros(1, 1, 32, 32)), network(white, data.center_hole(32, 0.3)))


@pytest.mark.parametrize("res", [32, 64, 128, 256])
def test_the_discriminator_has_log2_res_minus_2_halvings_and_one_logit(res):
    network = models.Discriminator(res, 4)
    strides = [layer.stride[0] for layer in network.judge if isinstance(layer, torch.nn.Conv2d)]
    assert strides == [2] * int(math.log2(res) - 2) + [1]
    logits = network(torch.rand(3, 3, res, res))
    assert logits.shape == (3,) and network.judge[0].in_channels == 3


@pytest.mark.parametrize("network", [models.UNet(4, 4, "swish"), models.Discriminator(32, 4)], ids=["unet", "discriminator"])
def test_gradients_reach_every_weight(network):
    inputs = [torch.rand(4, 3, 32, 32)] + ([data.center_hole(32, 0.3)] if isinstance(network, models.UNet) else [])
    network(*inputs).square().sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_dcgan_starts_with_a_standard_deviation_of_two_hundredths():
    network = models.Discriminator(64, 32)
    models.dcgan_init(network)
    for layer in network.judge:
        if isinstance(layer, torch.nn.Conv2d):
            assert 0.018 < layer.weight.std() < 0.022
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert abs(layer.weight.mean() - 1) < 0.02 and (layer.bias == 0).all()


def test_harmonic_diffusion_continues_a_plane_exactly_and_keeps_the_known_pixels(faces):
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    plane, mask = (0.3 * x + 0.6 * y)[None, None].expand(2, 3, 64, 64), data.center_hole(64, 0.3)
    assert (models.harmonic(data.damage(plane, mask), mask) - plane).abs().max() < 1e-5
    filled = models.harmonic(data.damage(faces, mask), mask)
    assert torch.equal(filled * (1 - mask), faces * (1 - mask))


def test_harmonic_diffusion_solves_laplaces_equation_in_holes_of_any_place(faces):
    mask = data.box_mask(torch.tensor([[0, 10, 30, 40], [20, 20, 64, 64]]), 64)
    filled = models.harmonic(faces[:2], mask)
    padded = F.pad(filled, (1, 1, 1, 1), mode="replicate")
    mean = (padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]) / 4
    assert ((mean - filled) * mask).abs().max() < 1e-3


# === losses.py: SSIM ==============================================================================


def naive_ssim(x, y, data_range=1.0):
    """The definition in float64 numpy, window by window: (C, H, W) twice -> a number."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    d = np.arange(11) - 5.0
    line = np.exp(-(d**2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel, i, j in itertools.product(range(x.shape[0]), range(x.shape[1] - 10), range(x.shape[2] - 10)):
        a, b = x[channel, i : i + 11, j : j + 11], y[channel, i : i + 11, j : j + 11]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        cov = (window * (a - ma) * (b - mb)).sum()
        values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def ssim_pairs():
    g = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 24, 28, generator=g)
    ramp = torch.linspace(0, 1, 28).expand(3, 24, 28)
    flat = torch.ones(3, 24, 28)
    face = data.synthetic_faces(2, 32, 0).float() / 255
    return {
        "noise": (noise, torch.rand(3, 24, 28, generator=g)),
        "noise and itself a little changed": (noise, (noise + 0.05 * torch.randn(3, 24, 28, generator=g)).clamp(0, 1)),
        "ramp and its mirror image": (ramp, ramp.flip(2)),
        "flat and bright": (flat, 0.8 * flat),
        "flat, bright and dark": (0.9 * flat, 0.1 * flat),
        "bright with a little noise": (1 - 0.01 * noise, 1 - 0.02 * noise.flip(1)),
        "faces": (face[0], face[1]),
        "channels that differ": (torch.stack([ramp[0], noise[1], flat[0]]), noise),
        "halves, dark and bright": (torch.cat([0.1 * flat, 0.9 * flat], 2), torch.cat([0.2 * flat, 0.9 * flat], 2)),
    }


@pytest.mark.parametrize("name", ssim_pairs())
def test_ssim_is_the_definition_window_by_window(name):
    x, y = ssim_pairs()[name]
    expected = naive_ssim(x, y)
    tolerance = 2e-5 if "halves" in name else 2e-6  # float32 itself, where a flat part is far from the picture's mean
    assert abs(losses.ssim(x[None], y[None]).item() - expected) < tolerance
    x64, y64 = x[None].double(), y[None].double()
    assert abs(losses.ssim(x64, y64).item() - naive_ssim(x64[0], y64[0])) < 1e-12


@pytest.mark.parametrize("a, b, expected", [(1, 0.8, 0.975611), (1, 0, 9.999e-5), (0, 0, 1), (0.3, 0.3, 1)])
def test_ssim_of_flat_pictures_has_its_closed_form(a, b, expected):
    flat = torch.ones(2, 3, 32, 32)
    assert torch.allclose(losses.ssim(a * flat, b * flat), torch.tensor(float(expected)), atol=2e-6)


def test_ssim_is_symmetric_at_most_1_and_below_0_for_a_negative(faces):
    other = faces.roll(1, 0)
    assert torch.allclose(losses.ssim(faces, other), losses.ssim(other, faces), atol=1e-6)
    assert torch.allclose(losses.ssim(faces, faces), torch.ones(24), atol=1e-6)
    noise = torch.rand(2, 3, 32, 32)
    assert (losses.ssim(noise, 1 - noise) < -0.9).all()


def test_ssim_does_not_depend_on_the_range_that_it_is_told(faces):
    other = faces.roll(1, 0)
    assert torch.allclose(losses.ssim(faces * 255, other * 255, data_range=255), losses.ssim(faces, other), atol=1e-6)


def test_ssim_is_float32_under_autocast_and_keeps_float64(faces):
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.ssim(faces, faces.roll(1, 0))
    assert inside.dtype == torch.float32 and torch.equal(inside, losses.ssim(faces, faces.roll(1, 0)))
    assert losses.ssim(faces.bfloat16(), faces.bfloat16()).dtype == torch.float32
    assert losses.ssim(faces.double(), faces.double()).dtype == torch.float64


def test_the_gradient_of_ssim_is_right_and_finite_on_flat_pictures():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, 13, 12, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(losses.ssim, (x, y))
    for a, b in ((1.0, 1.0), (0.0, 0.0), (1.0, 0.8)):
        flat = torch.full((1, 3, 16, 16), a, requires_grad=True)
        losses.dssim(flat, torch.full((1, 3, 16, 16), b)).backward()
        assert torch.isfinite(flat.grad).all()


def test_ssim_and_its_gradient_are_those_of_a_plain_convolution_on_large_pictures():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, 90, 150, generator=g, dtype=torch.float64) for _ in range(2))
    line = losses.gaussian_window()
    window = torch.outer(line, line).expand(3, 1, 11, 11)

    def plain(x, y):
        mx, my, xx, yy, xy = (F.conv2d(z, window, groups=3) for z in (x, y, x * x, y * y, x * y))
        top = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
        return (top / ((mx**2 + my**2 + 1e-4) * (xx - mx**2 + yy - my**2 + 9e-4))).mean((1, 2, 3))

    for way in ((x.clone().requires_grad_(), y), (x, y.clone().requires_grad_())):
        (ours,) = torch.autograd.grad(losses.ssim(*way).sum(), [z for z in way if z.requires_grad])
        (theirs,) = torch.autograd.grad(plain(*way).sum(), [z for z in way if z.requires_grad])
        assert torch.allclose(losses.ssim(*way), plain(*way), atol=1e-12) and torch.allclose(ours, theirs, atol=1e-12)


def test_ssim_refuses_pictures_smaller_than_its_window_and_other_shapes():
    with pytest.raises(ValueError, match="11 x 11"):
        losses.ssim(torch.rand(1, 3, 10, 64), torch.rand(1, 3, 10, 64))
    with pytest.raises(ValueError, match="one shape"):
        losses.ssim(torch.rand(1, 3, 16, 16), torch.rand(2, 3, 16, 16))


def test_dssim_is_half_of_1_minus_ssim(faces):
    other = faces.roll(1, 0)
    assert torch.allclose(losses.dssim(faces, other), (1 - losses.ssim(faces, other).mean()) / 2)
    assert losses.dssim(faces, faces).abs() < 1e-6


# === losses.py: PSNR and the 6 dB =================================================================


def test_psnr_has_its_closed_form_and_is_infinite_for_equal_pictures():
    x = torch.full((2, 3, 8, 8), 0.5)
    assert torch.allclose(losses.psnr(x, x + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0]), atol=1e-3)
    assert losses.psnr(x, x).tolist() == [math.inf, math.inf]
    assert abs(losses.psnr(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).item() - 6.0206) < 1e-4


def test_psnr_is_one_value_a_picture(faces):
    other = faces.roll(1, 0)
    expected = [10 * math.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(faces.double().numpy(), other.double().numpy())]
    assert np.allclose(losses.psnr(faces, other).numpy(), expected, atol=1e-4)


def test_psnr_with_a_mask_sees_only_the_hole_and_differs_by_the_area(faces):
    mask = data.center_hole(64, 0.3)
    restored = inpaint.restore(faces.roll(1, 0), faces, mask)
    hole, whole = losses.psnr(restored, faces, mask), losses.psnr(restored, faces)
    assert torch.allclose(whole - hole, torch.tensor(10 * math.log10(64**2 / 19**2)), atol=1e-3)
    assert torch.allclose(hole, losses.psnr(faces.roll(1, 0)[:, :, 22:41, 22:41], faces[:, :, 22:41, 22:41]), atol=1e-3)


@pytest.mark.parametrize(
    "x, message",
    [(torch.rand(1, 3, 8, 8) * 255, "0, 1"), (torch.rand(1, 3, 8, 8) - 0.5, "0, 1"), (torch.full((1, 3, 8, 8), math.nan), "nan"),
     (torch.ones(1, 3, 8, 8, dtype=torch.uint8), "uint8"), (torch.rand(1, 3, 8, 9), r"\(1, 3, 8, 9\)"), (torch.rand(3, 8, 8), "shape")],
)  # fmt: skip
def test_psnr_refuses_what_the_paper_very_probably_did(x, message):
    with pytest.raises(ValueError, match=message):
        losses.psnr(x, torch.zeros(1, 3, 8, 8))
    if x.dtype != torch.uint8 and x.shape == (1, 3, 8, 8):
        with pytest.raises(ValueError, match="second"):
            losses.psnr(torch.zeros(1, 3, 8, 8), x)


def test_a_good_restoration_scored_on_the_wrong_scale_looks_like_a_black_picture(faces):
    restored = (faces + 0.02 * torch.randn(faces.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert losses.psnr(restored, faces).mean() > 30
    pixels = faces * 255
    wrong = (10 * torch.log10(255**2 / (restored - pixels).square().mean((1, 2, 3)))).mean()  # [0, 1] against [0, 255]
    assert abs(wrong - losses.psnr(torch.zeros_like(faces), faces).mean()) < 0.1


# === losses.py: the others ========================================================================


def test_l1_and_mse_are_plain_means_until_the_hole_counts_more(faces):
    other, mask = faces.roll(1, 0), data.center_hole(64, 0.3)
    assert torch.allclose(losses.l1(other, faces, mask), F.l1_loss(other, faces))
    assert torch.allclose(losses.mse(other, faces, mask), F.mse_loss(other, faces))
    weight = np.where(mask.numpy() > 0, 10.0, 1.0)
    expected = (np.abs(other.numpy() - faces.numpy()) * weight).sum() / (weight.sum() * 3 * 24)
    assert abs(losses.l1(other, faces, mask, 10).item() - expected) < 1e-6


def test_the_adversarial_losses_have_their_closed_forms_and_never_overflow():
    real, fake = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    d = 1 / (1 + np.exp(-real.numpy())), 1 / (1 + np.exp(-fake.numpy()))
    assert abs(losses.discriminator_loss(real, fake).item() + np.log(d[0]).mean() + np.log(1 - d[1]).mean()) < 1e-6
    smooth = -(0.9 * np.log(d[0]) + 0.1 * np.log(1 - d[0])).mean() - np.log(1 - d[1]).mean()
    assert abs(losses.discriminator_loss(real, fake, 0.1).item() - smooth) < 1e-6
    assert abs(losses.generator_loss(fake).item() + np.log(d[1]).mean()) < 1e-6
    assert torch.isfinite(losses.discriminator_loss(torch.tensor([-1e4]), torch.tensor([1e4])))


@pytest.mark.parametrize(
    "text, expected",
    [("l1", {"l1": 1}), ("mse+dssim", {"mse": 0.5, "dssim": 0.5}), ("100*l1+adversarial", {"l1": 100, "adversarial": 1}),
     (" 2.5*l1 + dssim ", {"l1": 2.5, "dssim": 1}), ("l1+mse+dssim+adversarial", dict.fromkeys(losses.TERMS, 0.25))],
)  # fmt: skip
def test_the_loss_grammar(text, expected):
    assert losses.parse_loss(text) == expected


@pytest.mark.parametrize("text", ["", "l2", "l1+l1", "0*l1", "-1*l1", "nan*l1", "inf*l1", "l1+", "*l1", "l1*2", "2*3*l1", "x*l1"])
def test_the_loss_grammar_refuses(text):
    with pytest.raises(ValueError, match="l1|weight"):
        losses.parse_loss(text)


# === inpaint.py: training =========================================================================


def small_batch(count=8, res=32):
    return data.synthetic_faces(count, res, 7).float() / 255, data.center_hole(res, 0.3).expand(count, 1, res, res)


def test_one_batch_of_32_faces_is_overfitted():
    image, mask = small_batch(32)
    run = inpaint.build(options_for(width=16), CPU)
    for step in range(150):
        run.optimizers["generator"].param_groups[0]["lr"] = inpaint.learning_rate(2e-3, step, 150)
        inpaint.training_step(run, image, mask)
    run.generator.eval()
    with torch.no_grad():
        output = run.generator(data.damage(image, mask), mask)
    assert losses.psnr(output, image, mask).mean() > 25, "a network that cannot learn 32 faces by heart has a bug"


@pytest.mark.parametrize("loss", ["adversarial", "100*l1+adversarial", "l1", "mse+dssim"])
def test_a_step_trains_what_the_loss_says_and_reports_its_terms(loss):
    image, mask = small_batch()
    run = inpaint.build(options_for("gan", loss=loss), CPU)
    before = {name: value.clone() for name, value in run.generator.named_parameters()}
    report = inpaint.training_step(run, image, mask)
    assert set(losses.parse_loss(loss)) <= set(report)
    assert (run.discriminator is not None) == ("D(x)" in report) == ("adversarial" in loss)
    for name, value in run.generator.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} was not trained"


def test_the_gan_starts_as_a_copy_of_its_input():
    run, (image, mask) = inpaint.build(options_for("gan"), CPU), small_batch()
    known = (1 - mask).expand_as(image) > 0
    assert (inpaint.paint(run, image, mask) - image)[known].abs().max() < 0.1, "that is what keeps its game stable"


@pytest.mark.parametrize("model, decay, rates", [("unet", 0.05, [2e-3]), ("gan", 0, [2e-3, 2e-4])])
def test_weight_decay_is_for_reconstruction_and_the_discriminator_learns_slowly(model, decay, rates):
    run = inpaint.build(options_for(model, lr=2e-3, epochs=10**6), CPU)
    inpaint.train_epoch(run, data.synthetic_faces(16, 32), 8)
    groups = [optimizer.param_groups[0] for optimizer in run.optimizers.values()]
    assert [group["weight_decay"] for group in groups] == [decay] * len(groups)
    assert [group["lr"] for group in groups] == pytest.approx(rates, rel=1e-4)


def test_real_pictures_are_to_be_judged_nine_tenths_real(monkeypatch):
    asked, judge = [], losses.discriminator_loss
    monkeypatch.setattr(losses, "discriminator_loss", lambda real, fake, smooth: asked.append(smooth) or judge(real, fake, smooth))
    inpaint.training_step(inpaint.build(options_for("gan"), CPU), *small_batch())
    assert asked == [0.1]


def test_the_adversarial_loss_reaches_the_painter_and_not_the_frozen_discriminator(monkeypatch):
    image, mask = small_batch()
    run = inpaint.build(options_for("gan"), CPU)
    updated = []
    real_update = inpaint.update

    def spy(optimizer, loss):
        judge = [weight.clone() for weight in run.discriminator.parameters()]
        real_update(optimizer, loss)
        updated.append(any(not torch.equal(a, b) for a, b in zip(judge, run.discriminator.parameters())))

    monkeypatch.setattr(inpaint, "update", spy)
    inpaint.training_step(run, image, mask)
    assert updated == [True, False], "first the discriminator's step, then the painter's"
    assert all(weight.grad.abs().sum() > 0 for weight in run.generator.parameters())
    assert all(weight.requires_grad for weight in run.discriminator.parameters())


def test_the_learning_rate_falls_to_zero_over_all_steps():
    rates = [inpaint.learning_rate(0.002, step, 10) for step in range(10)]
    assert rates[0] == 0.002 and rates[-1] == pytest.approx(0.0002) and rates == sorted(rates, reverse=True)
    assert inpaint.learning_rate(0.002, 5, 20) > inpaint.learning_rate(0.002, 5, 10), "more epochs recompute it"


def test_the_average_of_the_weights_warms_up_and_covers_the_batch_norm():
    network, ema = models.UNet(3, 4, "relu"), models.UNet(3, 4, "relu")
    weight, start = network.up[0][0].weight, ema.up[0][0].weight.detach().clone()
    network.down[1][1].running_mean.fill_(3)
    inpaint.update_ema(ema, network, 0)
    assert torch.allclose(ema.up[0][0].weight, 0.1 * start + 0.9 * weight, atol=1e-6)
    assert torch.allclose(ema.down[1][1].running_mean, torch.tensor(2.7))
    inpaint.update_ema(ema, network, 10**6)
    assert torch.allclose(ema.down[1][1].running_mean, torch.tensor(2.7 + 0.001 * 0.3))


def test_validation_is_the_mean_of_per_picture_values_and_the_same_bits_twice(faces):
    pixels, mask = (faces * 255).round().to(torch.uint8), data.center_hole(64, 0.3)
    run = inpaint.build(options_for(res=64), CPU)
    first, second = (inpaint.validate(lambda image: inpaint.paint(run, image, mask), pixels, mask) for _ in range(2))
    assert first == second
    image = pixels.float() / 255
    output = inpaint.paint(run, image, mask)
    assert first["psnr_output"] == pytest.approx(losses.psnr(output, image).mean().item(), abs=1e-4)
    assert first["psnr_hole"] == pytest.approx(losses.psnr(output, image, mask).mean().item(), abs=1e-4)
    assert first["psnr_restored"] == pytest.approx(first["psnr_hole"] + 10 * math.log10(64**2 / 19**2), abs=1e-3)
    assert first["ssim_restored"] == pytest.approx(losses.ssim(inpaint.restore(output, image, mask), image).mean().item(), abs=1e-5)
    assert first["pictures"] == 24


def test_what_is_painted_does_not_depend_on_the_other_pictures_of_a_batch():
    run, image, mask = inpaint.build(options_for(precision="float32"), CPU), small_batch()[0], data.center_hole(32, 0.3)
    for weight in run.ema.parameters():
        weight.normal_(0, 0.3)
    assert torch.equal(inpaint.paint(run, image, mask), inpaint.paint(run, image, mask))
    assert torch.allclose(inpaint.paint(run, image, mask)[:1], inpaint.paint(run, image[:1], mask), atol=1e-5), "not evaluation mode"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(monkeypatch, capsys):
    step = inpaint.training_step
    count = itertools.count()

    def poisoned(run, image, mask):
        if next(count) == 6:  # in the second epoch
            with torch.no_grad():
                run.generator.paint.weight.fill_(math.nan)
        return step(run, image, mask)

    monkeypatch.setattr(inpaint, "training_step", poisoned)
    assert command("--epochs", 3, "--out", "run", *TINY) == 2
    assert "l1 is nan in epoch 2" in capsys.readouterr().err
    state = inpaint.read_checkpoint("run/last.pt", CPU)
    assert state["epoch"] == 1 and all(torch.isfinite(value).all() for value in state["generator"].values())


# === inpaint.py: the run folder ===================================================================


def test_a_run_folder_holds_all_that_is_promised(tiny_run):
    names = {file.name for file in tiny_run.iterdir()}
    assert names == {"config.json", "log.csv", "last.pt", "best.pt", "grid.png", "curves.png", "results.json", "frames", "training.gif"}
    rows = read_csv(tiny_run / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[-1]["step"] == "8"
    assert {"seconds", "images_per_second", "l1", *inpaint.METRICS} <= set(rows[0])
    assert set(json.loads((tiny_run / "results.json").read_text())) == {*inpaint.METRICS, "epoch", "pictures"}
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["options"]["res"] == 32 and config["parameters"]["generator"] > 1000 and "torch" in config["versions"]
    with Image.open(tiny_run / "training.gif") as gif:
        assert gif.n_frames == 3 == len(list((tiny_run / "frames").iterdir())), "the start and two epochs"


def test_the_faces_of_the_film_stay_in_their_place_whatever_the_epoch(faces, tmp_path):
    run = inpaint.build(options_for(res=64), CPU)
    for run.epoch in (0, 9, 10, 999):
        inpaint.write_pictures(tmp_path, run, (faces * 255).to(torch.uint8), data.center_hole(64, 0.3), best=False)
    assert len({Image.open(file).size for file in (tmp_path / "frames").iterdir()}) == 1


def test_res_32_really_trains_at_32_pixels(tiny_run, monkeypatch):
    shapes = set()
    step = inpaint.training_step
    monkeypatch.setattr(inpaint, "training_step", lambda run, image, mask: shapes.add((image.shape, mask.shape)) or step(run, image, mask))
    assert command("--epochs", 1, *TINY) == 0
    assert shapes == {((8, 3, 32, 32), (8, 1, 32, 32))}
    assert Path("runs/unet-l1-relu-32/results.json").exists(), "the default folder tells model, loss, activation, resolution"


def test_res_256_trains():
    assert command("--epochs", 1, "--out", "run", *TINY, "--res", 256) == 0
    assert json.loads(Path("run/config.json").read_text())["options"]["res"] == 256


def test_a_model_rebuilt_from_a_checkpoint_gives_the_same_output_and_figures(tiny_run, capsys):
    one, two = inpaint.load_painter(tiny_run / "best.pt", CPU), inpaint.load_painter(tiny_run / "last.pt", CPU)
    assert all(torch.equal(value, two.ema.state_dict()[name]) for name, value in one.ema.state_dict().items()), "the last epoch was the best"
    assert command("--evaluate", tiny_run / "best.pt", "--json", "again.json", "--device", "cpu") == 0
    assert json.loads(Path("again.json").read_text()) == json.loads((tiny_run / "results.json").read_text())
    printed = capsys.readouterr().out
    assert all(name in printed for name in inpaint.METRICS)
    assert command("--evaluate", tiny_run / "last.pt", "--val", 1, "--res", 64, "--device", "cpu") == 0
    assert re.search(r"pictures +40\n", capsys.readouterr().out), "--val 1 measures all pictures"


def test_the_same_command_and_seed_gives_the_same_bytes():
    for name in ("a", "b"):
        assert command("--model", "gan", "--epochs", 1, "--out", name, *TINY) == 0
    for file in ("results.json", "grid.png", "training.gif"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes()
    assert command("--model", "gan", "--epochs", 1, "--seed", 1, "--out", "c", *TINY) == 0
    assert Path("a/results.json").read_bytes() != Path("c/results.json").read_bytes()


def without_times(folder):
    return [{name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in read_csv(Path(folder, "log.csv"))]


@pytest.mark.parametrize("model, loss", [("unet", "l1"), ("gan", "100*l1+adversarial")])
def test_a_run_that_was_stopped_and_resumed_ends_bit_for_bit_like_one_that_was_not(model, loss, monkeypatch, capsys):
    words = ["--model", model, "--loss", loss, "--act", "swish", "--epochs", 3, "--hole-at", "random", *TINY]
    assert command(*words, "--out", "whole") == 0
    step, count = inpaint.training_step, itertools.count()

    def interrupted(run, image, mask):
        if next(count) == 6:  # in the second epoch
            raise KeyboardInterrupt
        return step(run, image, mask)

    monkeypatch.setattr(inpaint, "training_step", interrupted)
    assert command(*words, "--out", "halved") == 130
    assert "--resume --out halved" in capsys.readouterr().err
    monkeypatch.setattr(inpaint, "training_step", step)
    assert command("--resume", "--out", "halved", "--device", "cpu") == 0
    for file in ("results.json", "grid.png", "training.gif"):
        assert Path("whole", file).read_bytes() == Path("halved", file).read_bytes()
    assert without_times("whole") == without_times("halved")
    whole, halved = (inpaint.read_checkpoint(f"{name}/last.pt", CPU) for name in ("whole", "halved"))
    for part in ("generator", "ema", "discriminator"):
        assert all(torch.equal(value, halved[part][name]) for name, value in whole.get(part, {}).items()), part


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, capsys):
    update, count = inpaint.update, itertools.count()

    def poisoned(optimizer, loss):
        update(optimizer, loss)
        if next(count) == 7:  # the last step of the first epoch is the fourth, of two updates each
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].fill_(math.inf)

    monkeypatch.setattr(inpaint, "update", poisoned)
    assert command("--model", "gan", "--epochs", 2, "--out", "run", *TINY) == 2
    assert "a weight (" in capsys.readouterr().err
    assert inpaint.read_checkpoint("run/last.pt", CPU)["epoch"] == 0


def test_more_epochs_are_not_forgotten_by_a_resume_that_is_stopped_at_once(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "run")
    step = inpaint.training_step
    monkeypatch.setattr(inpaint, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command("--resume", "--out", "run", "--epochs", 3, "--device", "cpu") == 130
    monkeypatch.setattr(inpaint, "training_step", step)
    assert command("--resume", "--out", "run", "--device", "cpu") == 0
    assert len(read_csv("run/log.csv")) == 3


def test_resume_takes_more_epochs_and_keeps_every_frame(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    assert command("--resume", "--out", "run", "--res", 32, "--depth", 3, "--epochs", 3, "--device", "cpu") == 0
    assert [row["epoch"] for row in read_csv("run/log.csv")] == ["1", "2", "3"]
    assert json.loads(Path("run/config.json").read_text())["options"]["epochs"] == 3
    with Image.open("run/training.gif") as gif:
        assert gif.n_frames == 4


def test_best_is_the_best_hole_and_without_a_distance_the_last_epoch(monkeypatch):
    values = iter([20.0, 22.0, 21.0] * 2)

    def fixed(painter, pixels, mask):
        return dict.fromkeys(inpaint.METRICS, 1.0) | {"psnr_hole": next(values), "pictures": 8}

    monkeypatch.setattr(inpaint, "validate", fixed)
    assert command("--epochs", 3, "--out", "unet", *TINY) == 0
    assert command("--model", "gan", "--epochs", 3, "--out", "gan", *TINY) == 0
    assert json.loads(Path("unet/results.json").read_text())["epoch"] == 2
    assert json.loads(Path("gan/results.json").read_text())["epoch"] == 3


def test_a_full_disk_stops_the_run_with_a_line_and_keeps_the_previous_checkpoint(monkeypatch, capsys):
    save, count = data.save, itertools.count()

    def full(path, content):
        if Path(path).name == "last.pt" and next(count) == 2:
            monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        save(path, content)

    monkeypatch.setattr(data, "save", full)
    assert command("--epochs", 3, "--out", "run", *TINY) == 2
    assert "No space left" in capsys.readouterr().err.strip().splitlines()[-1]
    assert inpaint.read_checkpoint("run/last.pt", CPU)["epoch"] == 1
    assert not [file for file in Path("run").iterdir() if file.suffix == ".tmp"]


def test_a_data_set_of_ten_pictures_and_a_batch_larger_than_it_train(tmp_path):
    write_photos(tmp_path / "ten", 10, 40)
    assert command("--data", "ten", "--epochs", 1, "--out", "run", *TINY, "--batch", 5000) == 0
    assert json.loads(Path("run/results.json").read_text())["pictures"] == 2


@slow
def test_a_run_needs_at_most_the_data_and_2_gb_of_memory(tmp_path):
    import resource

    whole = [sys.executable, str(HERE / "inpaint.py"), "--model", "unet", "--res", "64", "--epochs", "1", "--device", "cpu"]
    assert subprocess.run(whole, check=False).returncode == 0
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 5000 * 3 * 64 * 64 + 2 * 2**30


@slow
def test_compiled_networks_train_to_the_same_figures():
    for name, extra in (("plain", []), ("compiled", ["--compile"])):
        assert command("--model", "gan", "--epochs", 1, "--out", name, *extra, *TINY) == 0
    plain, compiled = (json.loads(Path(name, "results.json").read_text())["psnr_hole"] for name in ("plain", "compiled"))
    assert abs(plain - compiled) < 0.1


def test_bfloat16_trains_and_its_metrics_are_float32(monkeypatch):
    seen, measure = set(), inpaint.measure
    hook = torch.nn.modules.module.register_module_forward_hook(lambda layer, _, out: seen.add(out.dtype) if isinstance(layer, torch.nn.Conv2d) else None)
    monkeypatch.setattr(inpaint, "measure", lambda output, *rest: seen.add(("measured", output.dtype)) or measure(output, *rest))
    with hook:
        assert command("--epochs", 1, "--out", "run", "--precision", "bfloat16", *TINY) == 0
    assert math.isfinite(json.loads(Path("run/results.json").read_text())["psnr_hole"])
    assert seen == {torch.bfloat16, ("measured", torch.float32)}


# === inpaint.py: comparing ========================================================================


def test_compare_fills_the_table_and_goes_on_where_it_was_stopped(monkeypatch, capsys):
    words = ["--compare", "--epochs", 1, "--width", 4, "--batch", 8, "--res", 32, "--device", "cpu", "--out", "cmp"]
    step, count = inpaint.training_step, itertools.count()

    def stopped_in_the_third(run, image, mask):
        if next(count) == 10:  # four steps a row
            raise KeyboardInterrupt
        return step(run, image, mask)

    monkeypatch.setattr(inpaint, "training_step", stopped_in_the_third)
    assert command(*words) == 130
    assert "with the same command" in capsys.readouterr().err
    first = Path("cmp/unet-l1-relu-32-depth5-seed0/best.pt").stat().st_mtime_ns
    assert Path("cmp/table.md").read_text().count("U-Net") == 2
    assert command(*words) == 0 and next(count) == 11 + 4 * 5, "finished rows are not trained again"
    assert Path("cmp/unet-l1-relu-32-depth5-seed0/best.pt").stat().st_mtime_ns == first
    steps = [read_csv(file)[-1]["step"] for file in Path("cmp").glob("*/log.csv")]
    assert len(set(steps)) == 1, "no row was trained more than once"
    table = read_csv("cmp/table.csv")
    assert [row["network"] for row in table][-4:] == ["white hole", "harmonic diffusion", "mean face", "nearest face"]
    assert len(table) == 7 + 4, "at 32 pixels no deeper U-Net fits"
    assert all(float(row["psnr_hole"]) > 0 for row in table)
    assert table[0]["paper"] == "6.178" and Path("cmp/comparison.png").exists()
    whole = Path("cmp/table.md").read_bytes()
    monkeypatch.setattr(inpaint, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(*words, "--seeds", 2) == 130 and Path("cmp/table.md").read_bytes() == whole, "a table that was whole stays so"
    monkeypatch.setattr(inpaint, "training_step", step)
    capsys.readouterr()
    assert command(*words[:-1], "cmp", "--epochs", 2) == 2
    assert "contradicts" in capsys.readouterr().err


def test_compare_with_seeds_gives_mean_and_deviation(monkeypatch):
    monkeypatch.setattr(inpaint, "ROWS", inpaint.ROWS[:1])
    assert command("--compare", "--epochs", 1, "--seeds", 2, "--width", 4, "--batch", 8, "--res", 32, "--depth", 3) == 2, "depth is set row by row"
    assert command("--compare", "--epochs", 1, "--seeds", 2, "--width", 4, "--batch", 8, "--res", 32, "--device", "cpu") == 0
    row = read_csv("runs/compare/table.csv")[0]
    runs = [json.loads(file.read_text())["psnr_hole"] for file in sorted(Path("runs/compare").glob("*/results.json"))]
    assert row["psnr_hole"] == f"{np.mean(runs):.2f} ± {np.std(runs, ddof=1):.2f}"


def test_the_nearest_face_is_found_by_the_known_pixels_alone(faces):
    pixels, mask = (faces * 255).round().to(torch.uint8), data.center_hole(64, 0.3)
    image = pixels[[3, 17, 9]].float() / 255
    changed = image * (1 - mask) + mask * torch.rand_like(image)
    assert torch.equal(models.nearest_face(changed, mask, pixels, part=7), image)


# === inpaint.py: your own photo ===================================================================


def test_a_photo_is_restored_with_its_known_pixels_untouched_to_the_bit(tiny_run, tmp_path):
    face = data.to_picture(data.synthetic_faces(1, 128, 9)[0]).resize((301, 403))
    face.save(tmp_path / "me.png")
    assert command("--restore", "me.png", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    before, after = np.asarray(face), np.asarray(Image.open("restored/me-restored.png"))
    side = round(301 * 10 / 32)
    top, left = (403 - side) // 2, (301 - side) // 2
    hole = np.zeros(before.shape[:2], bool)
    hole[top : top + side, left : left + side] = True
    assert after.shape == before.shape and (after[~hole] == before[~hole]).all() and (after[hole] != before[hole]).any()
    assert Path("restored/me-compare.png").exists()


@pytest.mark.parametrize("kind", ["1 x 1", "portrait", "landscape", "palette", "16 bit", "cmyk", "EXIF turned", "5000 x 3000"])
def test_photos_of_any_size_and_kind_are_restored(kind, tiny_run, tmp_path):
    face = data.to_picture(data.synthetic_faces(1, 128, 9)[0])
    exif = Image.Exif()
    exif[0x0112] = 8
    size = {"1 x 1": (1, 1), "portrait": (97, 201), "landscape": (333, 100), "5000 x 3000": (5000, 3000)}.get(kind, (90, 120))
    face = face.resize(size)
    name = {"cmyk": "p.jpg", "palette": "p.gif", "EXIF turned": "p.jpg"}.get(kind, "p.png")
    stored = {"palette": face.convert("P"), "cmyk": face.convert("CMYK")}.get(kind, face)
    stored = Image.fromarray(np.asarray(face.convert("L")).astype(np.uint16) * 257) if kind == "16 bit" else stored
    stored.save(tmp_path / name, **({"exif": exif} if kind == "EXIF turned" else {}))
    assert command("--restore", name, "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    upright = np.asarray(data.open_photo(tmp_path / name))
    restored = np.asarray(Image.open("restored/p-restored.png"))
    assert restored.shape == upright.shape == (size[::-1] if kind != "EXIF turned" else size) + (3,)
    same = (restored == upright).all(2).mean()
    assert kind == "1 x 1" or same > 0.88


def save_mask(path, size, box, grey=255):
    mask = Image.new("L", size, 0)
    mask.paste(grey, box)
    mask.save(path)


HOLES = {"inside": (60, 90, 130, 170), "corner": (0, 0, 50, 60), "border": (150, 200, 200, 300), "wide": (20, 140, 190, 160)}


def step_ratio(picture, hole):
    """The mean step across the rim of a hole over the mean step between known neighbours beside the rim (4 pixels)."""
    near = F.max_pool2d(torch.from_numpy(hole)[None, None].float(), 9, 1, 4)[0, 0].numpy() > 0
    across, beside = [], []
    for flip in (False, True):
        image, inside, close = (a.swapaxes(0, 1) if flip else a for a in (picture.astype(float), hole, near))
        step = np.abs(np.diff(image, axis=0)).mean(2)
        across.append(step[inside[1:] ^ inside[:-1]])
        beside.append(step[~inside[1:] & ~inside[:-1] & close[1:] & close[:-1]])
    return np.concatenate(across), np.concatenate(beside)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_says_what_is_missing_wherever_it_is_and_leaves_no_seam(scale, tiny_run, tmp_path):
    across, beside = [], []
    for n, box in enumerate(HOLES.values()):
        face = data.to_picture(data.synthetic_faces(8, 256, 12)[n]).resize((200, 300))
        face.save(tmp_path / f"{n}.png")
        save_mask(tmp_path / "m.png", (200 // scale, 300 // scale), tuple(v // scale for v in box))
        assert command("--restore", f"{n}.png", "--mask", "m.png", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
        before, after = np.asarray(face), np.asarray(Image.open(f"restored/{n}-restored.png"))
        hole = np.zeros((300, 200), bool)
        hole[box[1] : box[3], box[0] : box[2]] = True
        assert (before[~hole] == after[~hole]).all() and (before[hole] != after[hole]).any()
        for steps, found in zip((across, beside), step_ratio(after, hole)):
            steps.append(found)
    assert np.concatenate(across).mean() <= 1.5 * np.concatenate(beside).mean()


def test_a_folder_restored_again_leaves_its_own_outputs_alone(tiny_run, tmp_path):
    write_photos(tmp_path, 1, 40)
    for _ in range(2):
        assert command("--restore", ".", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    assert len(list(Path("restored").iterdir())) == 4
    for _ in range(2):
        assert command("--restore", ".", "--out", ".", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    assert len(list(Path().glob("000*"))) == 1 + 4
    Path("000.jpg").unlink()
    assert command("--restore", "restored", "--out", "restored", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 2


def test_a_mask_may_be_larger_than_its_photo_by_the_rounding_of_a_pixel():
    photo = Image.new("RGB", (1000, 751))
    save_mask("mask.png", (4000, 3002), (400, 400, 800, 800))
    assert inpaint.photo_mask("mask.png", photo, 0.3).shape == (1, 751, 1000)


def test_a_photo_may_have_any_name(tiny_run, tmp_path):
    names = ["a b.jpg", "[1].jpg", "ä ÿ.jpg"] + (["**.jpg"] if os.name != "nt" else [])
    for name in names:
        write_photos(tmp_path, 1, 40)
        Path("000.jpg").rename(name)
    assert command("--restore", *names, "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    assert {file.stem for file in Path("restored").glob("*-restored.png")} == {Path(name).stem + "-restored" for name in names}


def test_nothing_is_overwritten_names_are_numbered(tiny_run, tmp_path):
    write_photos(tmp_path / "in", 1)
    for _ in range(3):
        assert command("--restore", "in", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 0
    names = {file.name for file in Path("restored").iterdir()}
    assert names == {f"000{n}-{kind}.png" for n in ("", "-2", "-3") for kind in ("restored", "compare")}


def test_of_ten_photos_one_broken_nine_are_restored_and_the_tenth_is_named(tiny_run, tmp_path, capsys):
    write_photos(tmp_path / "in", 10)
    (tmp_path / "in" / "004.jpg").write_bytes(b"broken")
    assert command("--restore", "in", "--checkpoint", tiny_run / "best.pt", "--device", "cpu") == 2
    assert len(list(Path("restored").glob("*-restored.png"))) == 9
    assert "9 of 10" in (told := capsys.readouterr().err) and "004.jpg" in told


# === inpaint.py: several processes ================================================================


@slow
def test_torchrun_trains_resumes_and_leaves_one_run(tmp_path):
    write_photos(tmp_path / "photos", 40, 40)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "inpaint.py"), "--device", "cpu"]
    for extra in (["--data", "photos", "--model", "gan", "--epochs", "1", *TINY], ["--model", "gan", "--res", "32", "--resume", "--epochs", "2"]):
        done = subprocess.run([*words, *extra], check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    assert [file.name for file in Path("runs").iterdir()] == ["gan-adversarial-relu-32"]
    assert len(read_csv("runs/gan-adversarial-relu-32/log.csv")) == 2


def two_processes(rank, folder, model, loss):
    """One of two gloo processes: the gradients of one step on its half, then a small run; saved for the test."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.chdir(folder)
    data.SYNTHETIC = 40
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    image, mask = small_batch(16)
    half = slice(8 * rank, 8 * rank + 8)
    run = inpaint.build(options_for(model, loss=loss, lr=0.0, precision="float32"), CPU)
    inpaint.training_step(run, image[half], mask[half])
    gradients = [weight.grad.clone() for net in (run.generator, run.discriminator) if net for weight in net.parameters()]
    run = inpaint.build(options_for(model, loss=loss), CPU)
    for _ in range(5):
        inpaint.training_step(run, image[half], mask[half])
    inpaint.average_buffers(run.ema)
    states = [net.state_dict() for net in (run.generator, run.discriminator) if net]
    weights = [value for state in states for name, value in state.items() if "running" not in name] + list(run.ema.state_dict().values())
    torch.save((gradients, weights), f"{folder}/{rank}.pt")
    inpaint.train(options_for(model, loss=loss, epochs=2), Path("run"), False, CPU)
    dist.destroy_process_group()


@pytest.mark.parametrize("model, loss", [("unet", "l1+dssim"), ("gan", "100*l1+adversarial")])
def test_two_processes_average_their_gradients_and_stay_equal(model, loss, tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), model, loss), nprocs=2)
    (gradients, weights), (gradients2, weights2) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    image, mask = small_batch(16)
    halves = []
    for half in (slice(0, 8), slice(8, 16)):
        run = inpaint.build(options_for(model, loss=loss, lr=0.0, precision="float32"), CPU)
        inpaint.training_step(run, image[half], mask[half])
        halves.append([weight.grad for net in (run.generator, run.discriminator) if net for weight in net.parameters()])
    for found, found2, one, two in zip(gradients, gradients2, *halves):
        assert torch.equal(found, found2) and torch.allclose(found, (one + two) / 2, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights2))
    assert json.loads(Path("run/results.json").read_text())["epoch"] == 2
    assert json.loads(Path("run/config.json").read_text())["processes"] == 2


# === Nothing breaks it: what must be refused ======================================================


def zip_of(path, names, content=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content or png_bytes())
    return path


def png_bytes(size=(20, 20)):
    return data.png(Image.new("RGB", size, "red"))


def with_password(path):
    """A zip whose members say that they are encrypted."""
    raw = bytearray(zip_of(path, ["a.png", "b.png"]).read_bytes())
    for start, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := raw.find(start, at + 1)) >= 0:
            raw[at + flag] |= 1
    path.write_bytes(raw)


def bomb(path):
    """A PNG of a few bytes that says it is 30000 x 30000."""
    raw = bytearray(png_bytes())
    raw[16:24] = (30000).to_bytes(4, "big") * 2
    raw[29:33] = zipfile.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    path.write_bytes(raw)


class Evil:
    """A pickle of this would make a folder when it is read."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.fixture
def traps(tmp_path, tiny_run, monkeypatch):
    """Every wrong input that the table below names, in the working directory."""
    write_photos(tmp_path / "good", 4, 40)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no picture")
    write_photos(tmp_path / "one", 1, 40)
    (tmp_path / "synthetic").mkdir()
    (tmp_path / "broken").mkdir()
    for n in range(3):
        (tmp_path / "broken" / f"{n}.jpg").write_bytes(b"broken")
    (tmp_path / "bombs").mkdir()
    for n in "abc":
        bomb(tmp_path / "bombs" / f"{n}.png")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    whole = zip_of(tmp_path / "whole.zip", [f"{n}.png" for n in range(9)]).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    zip_of(tmp_path / "empty.zip", [])
    with_password(tmp_path / "locked.zip")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty.pt").write_bytes(b"")
    best = (tiny_run / "best.pt").read_bytes()
    (tmp_path / "best.pt").write_bytes(best)
    (tmp_path / "cut.pt").write_bytes(best[: len(best) // 2])
    torch.save({"weights": torch.rand(3)}, tmp_path / "other.pt")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    state = torch.load(tmp_path / "best.pt")
    torch.save(state | {"version": 99}, tmp_path / "version.pt")
    torch.save(state | {"options": state["options"] | {"res": 33}}, tmp_path / "options.pt")
    torch.save(state | {"options": state["options"] | {"width": 5}}, tmp_path / "width.pt")
    torch.save(state | {"kind": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copytree(tiny_run, tmp_path / "headless")
    (tmp_path / "headless" / "last.pt").unlink()
    monkeypatch.setattr(data, "SYNTHETIC", 30)
    Image.new("L", (40, 40), 0).save(tmp_path / "black.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "white.png")
    save_mask(tmp_path / "wide.png", (80, 40), (10, 10, 20, 20))
    save_mask(tmp_path / "mask.png", (40, 40), (10, 10, 20, 20))
    return tmp_path


PHOTO = "--restore good/000.jpg --checkpoint best.pt"
REFUSED = {
    "data that does not exist": ("--data nowhere", "does not exist"),
    "data that is empty": ("--data empty", "holds no picture"),
    "data without a picture": ("--data text", "holds no picture"),
    "data with one picture": ("--data one", "leaves 1 to train on"),
    "data that is no zip": ("--data no.zip", "no zip"),
    "data that is a cut zip": ("--data cut.zip", "no zip"),
    "data that is an empty zip": ("--data empty.zip", "holds no picture"),
    "data that is a zip with a password": ("--data locked.zip", "password"),
    "data of broken pictures": ("--data broken", "3 of 3 pictures are broken"),
    "data that is a decompression bomb": ("--data bombs", "decompression bomb"),
    "res 0": ("--res 0", "--res"),
    "res -64": ("--res=-64", "--res"),
    "res 7": ("--res 7", "--res"),
    "res 63": ("--res 63", "--res"),
    "res 1024": ("--res 1024", "--res"),
    "res 64.5": ("--res 64.5", "--res"),
    "hole 0": ("--hole 0", "--hole"),
    "hole 1": ("--hole 1", "--hole"),
    "hole -0.1": ("--hole=-0.1", "--hole"),
    "hole nan": ("--hole nan", "--hole"),
    "a hole without a pixel": ("--hole 0.001", "0 pixels wide"),
    "a hole without a rest": ("--hole 0.999", "32 pixels wide"),
    "val 0": ("--val 0", "--val"),
    "val 1.5": ("--val 1.5", "--val"),
    "val 1 in training": ("--val 1", "--evaluate only"),
    "a validation part that is empty": ("--data good --val 0.01", "leaves 4 to train on and 0 to validate"),
    "a training part that is empty": ("--data good --val 0.99", "leaves 0 to train on"),
    "epochs 0": ("--epochs 0", "--epochs"),
    "epochs -1": ("--epochs=-1", "--epochs"),
    "batch 0": ("--batch 0", "--batch"),
    "batch -8": ("--batch=-8", "--batch"),
    "batch 1.5": ("--batch 1.5", "--batch"),
    "width 0": ("--width 0", "--width"),
    "width -4": ("--width=-4", "--width"),
    "depth 0": ("--depth 0", "--depth"),
    "depth -1": ("--depth=-1", "--depth"),
    "a depth that halves below one pixel": ("--depth 6", "--depth 6 halves --res 32"),
    "lr 0": ("--lr 0", "--lr"),
    "lr negative": ("--lr=-0.1", "--lr"),
    "lr nan": ("--lr nan", "--lr"),
    "lr inf": ("--lr inf", "--lr"),
    "hole weight 0": ("--hole-weight 0", "--hole-weight"),
    "seed -1": ("--seed=-1", "--seed"),
    "an unknown device": ("--device tpu", "--device"),
    "cuda where there is none": ("--device cuda", "has none"),
    "an unknown loss": ("--loss l3", "unknown"),
    "a loss given twice": ("--loss l1+l1", "given twice"),
    "a loss of weight 0": ("--loss 0*l1", "weight"),
    "an unknown activation": ("--act gelu", "--act"),
    "an unknown model": ("--model vae", "--model"),
    "an unknown option": ("--colour red", "--colour"),
    "out that is a file": ("--out file", "--out"),
    "out below a file": ("--out file/run", "no folder that can be written to"),
    "out that holds a run": ("--out run", "--resume"),
    "resume without a run": ("--resume --out empty", "no run"),
    "resume of nothing": ("--resume", "no run"),
    "resume of another model": ("--resume --out run --model gan", "--model gan contradicts --model unet"),
    "resume with another loss": ("--resume --out run --loss mse", "--loss mse contradicts --loss l1"),
    "resume with fewer epochs": ("--resume --out run --epochs 1", "--epochs 1 contradicts --epochs 2"),
    "resume with another seed": ("--resume --out run --seed 9", "contradicts"),
    "a checkpoint that is missing": ("--evaluate nothing.pt", "does not exist"),
    "a checkpoint that is empty": ("--evaluate empty.pt", "no checkpoint"),
    "a checkpoint that is cut": ("--evaluate cut.pt", "no checkpoint"),
    "a checkpoint that is text": ("--evaluate file", "no checkpoint"),
    "a checkpoint of another program": ("--evaluate other.pt", "another program"),
    "a checkpoint that is a list": ("--evaluate list.pt", "another program"),
    "a checkpoint of another version": ("--evaluate version.pt", "version 99"),
    "a checkpoint with impossible options": ("--evaluate options.pt", "damaged"),
    "a checkpoint whose weights do not fit": ("--evaluate width.pt", "damaged"),
    "a checkpoint that would run code": ("--evaluate evil.pt", "no checkpoint"),
    "a pickle that would run code": ("--evaluate pickle.pt", "no checkpoint"),
    "a checkpoint that is a folder": ("--evaluate run", "run/best.pt"),
    "restore without a checkpoint": ("--restore good/000.jpg", "needs --checkpoint"),
    "a photo that does not exist": ("--restore nobody.jpg --checkpoint best.pt", "nobody.jpg"),
    "a photo that is text": ("--restore file --checkpoint best.pt", "file"),
    "a photo that is a bomb": ("--restore bombs/b.png --checkpoint best.pt", "decompression bomb"),
    "a folder without photos": ("--restore text --checkpoint best.pt", "holds no picture"),
    "a mask that is black": (f"{PHOTO} --mask black.png", "all black"),
    "a mask that is white": (f"{PHOTO} --mask white.png", "all white"),
    "a mask of other proportions": (f"{PHOTO} --mask wide.png", "proportions"),
    "a mask that is no picture": (f"{PHOTO} --mask file", "--mask file"),
    "a mask that does not exist": (f"{PHOTO} --mask nowhere.png", "nowhere.png"),
    "restored photos into a file": (f"{PHOTO} --out file", "--out"),
    "two jobs at once": ("--compare --evaluate best.pt", "two jobs"),
    "a mask without a photo": ("--mask mask.png", "does nothing in a training: leave it out, or add --restore"),
    "an option that means nothing to a job": ("--evaluate best.pt --seed 0", "--seed does nothing with --evaluate"),
    "a checkpoint of an empty name": ("--evaluate=", "does not exist"),
    "data of an empty name": ("--data=", "give the path"),
    "data that could be drawn or a folder": ("--data synthetic", "./synthetic"),
    "a photo as a mask": (f"{PHOTO} --mask good/001.jpg", "grey, like a photo"),
    "a hole weight that nothing counts": ("--model gan --hole-weight 3", "does nothing with --loss adversarial"),
    "resume of a run whose last.pt is gone": ("--resume --out headless", "last.pt is missing"),
    "json into what is no file": ("--evaluate best.pt --json good", "no file that can be replaced"),
    "json into no folder": ("--evaluate best.pt --json nowhere/a.json", "no folder"),
    "resume with other pictures": ("--resume --out run --epochs 3", "start it as before"),
    "compare with a model": ("--compare --model gan", "--model does nothing with --compare"),
    "seeds 0": ("--compare --seeds 0", "--seeds"),
}  # fmt: skip


def snapshot(folder):
    """Every file below a folder and when it was written, and every folder but the cache."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*") if path.name != "cache"}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_in_one_clear_line(case, traps, capfd):
    words, expected = REFUSED[case]
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    before = snapshot(traps)
    defaults = [] if any(job in words for job in ("--evaluate", "--restore", "--resume", "--compare")) else ["--res", "32", "--width", "4"]
    assert command(*defaults, *words.split()) == 2
    told = capfd.readouterr().err
    line = told.strip().splitlines()[-1]
    assert line.startswith("inpaint.py: ") and expected in line and "Traceback" not in told
    assert told.count("\n") == 1 or "pictures are broken" in told or "warning" in told, "one line"
    assert snapshot(traps) == before, "nothing may be written or lost"
    assert not Path("ran").exists(), "code from a file was run"


def test_out_of_memory_is_told_in_one_line_and_leaves_nothing(monkeypatch, capsys):
    monkeypatch.setattr(inpaint, "build", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")))
    assert command("--out", "a/run", *TINY) == 2
    assert capsys.readouterr().err == "inpaint.py: out of memory: try a smaller --batch, --width or --res\n"
    assert not Path("a").exists()


def test_out_that_cannot_be_written_is_refused(monkeypatch, capsys):
    Path("locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path))  # root may write anywhere
    assert command("--out", "locked/run", *TINY) == 2
    assert "no folder that can be written to" in capsys.readouterr().err


# === Nothing is lost: kills, two at once, damaged files ===========================================


def start(*argv):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import data, inpaint; data.SYNTHETIC = 40; inpaint.main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_whole(folder):
    if (Path(folder) / "last.pt").exists():
        inpaint.read_checkpoint(Path(folder) / "last.pt", CPU)
    for file in Path("cache").glob("*.u8"):
        count, rest = divmod(file.stat().st_size - 64, 3 * 32 * 32)
        assert count == 150 and rest == 0


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=slow)])
def test_a_run_killed_at_random_moments_goes_on_each_time(kills, tmp_path):
    write_photos(tmp_path / "photos", 150, 200, ".png")
    words = ["--data", "photos", "--model", "gan", "--epochs", 4 if kills == 3 else 25, "--out", "run", *TINY]
    whole = start(*words[:-2], "--device", "cpu", "--out", "whole")
    assert whole.wait() == 0, whole.stderr.read()
    shutil.rmtree("cache")
    chances = random.Random(0)
    for n in range(kills):
        resume = ["--resume"] if Path("run/config.json").exists() else []
        process = start(*words, *resume)
        time.sleep(chances.uniform(1, 4 if kills == 3 else 7))  # from importing and caching to the middle of the run
        process.send_signal(signal.SIGKILL)
        process.wait()
        check_whole("run")
    last = start(*words, *(["--resume"] if Path("run/config.json").exists() else []))
    assert last.wait() == 0, last.stderr.read()
    for file in ("results.json", "grid.png", "training.gif"):
        assert Path("run", file).read_bytes() == Path("whole", file).read_bytes()
    assert without_times("run") == without_times("whole")


def test_two_runs_started_together_end_well_with_one_cache_and_two_folders(tmp_path):
    write_photos(tmp_path / "photos", 60, 64)
    runs = [start("--data", "photos", "--epochs", 1, *TINY) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], [run.stderr.read() for run in runs]
    assert {folder.name for folder in Path("runs").iterdir()} == {"unet-l1-relu-32", "unet-l1-relu-32-2"}
    assert len({file.read_bytes() for file in Path("runs").glob("*/results.json")}) == 1
    assert [file.suffix for file in Path("cache").iterdir()] == [".u8"]


def mutate(content, chances):
    """Bits flipped, bytes cut out, or a part copied over another."""
    raw, way = bytearray(content), chances.randrange(3)
    if way == 0:
        for _ in range(chances.randint(1, 20)):
            raw[chances.randrange(len(raw))] ^= 1 << chances.randrange(8)
    elif way == 1:
        start = chances.randrange(len(raw))
        del raw[start : start + chances.randint(1, len(raw))]
    else:
        a, b, size = chances.randrange(len(raw)), chances.randrange(len(raw)), chances.randint(1, 200)
        raw[a : a + size] = raw[b : b + size]
    return bytes(raw)


@pytest.mark.parametrize("count", [52, pytest.param(1000, marks=slow)])
def test_damaged_files_are_read_or_refused_and_nothing_else(count, tmp_path, tiny_run, capfd):
    face = data.to_picture(data.synthetic_faces(1, 64, 0)[0])
    seeds = {"png": data.png(face), "pt": (tiny_run / "best.pt").read_bytes()}
    face.save(tmp_path / "face.jpg")
    seeds["jpg"] = (tmp_path / "face.jpg").read_bytes()
    seeds["zip"] = zip_of(tmp_path / "face.zip", ["a.jpg", "b/c.jpg"], seeds["jpg"]).read_bytes()
    outcomes = dict.fromkeys(itertools.product(seeds, ("read", "refused")), 0)
    chances = random.Random(1)
    for n in range(count):
        kind = list(seeds)[n % 4]
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / f"m.{kind}").write_bytes(mutate(seeds[kind], chances))
        began = time.time()
        try:
            if kind == "pt":
                inpaint.load_painter(folder / "m.pt", CPU)
            else:
                data.load_images(folder if kind != "zip" else folder / "m.zip", 32, folder / "cache")
            outcomes[kind, "read"] += 1
        except InputError as error:
            assert str(error)
            outcomes[kind, "refused"] += 1
        assert time.time() - began < 5
        shutil.rmtree(folder)
    print(outcomes)
    assert sum(outcomes.values()) == count and all(outcomes[kind, "refused"] for kind in seeds)


def test_our_own_code_gives_no_warning(tmp_path):
    write_photos(tmp_path / "photos", 40, 40)
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import inpaint; [inpaint.main(line.split()) for line in sys.argv[1:]]"
    train = " ".join(["--data photos --epochs 1 --out run --model gan", *TINY])
    jobs = [train, "--evaluate run/best.pt", "--restore photos/000.jpg --checkpoint run/best.pt"]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *jobs], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# === On real pictures =============================================================================


@pytest.fixture(scope="session")
def celeba(tmp_path_factory):
    """The shared pictures at 32 px."""
    return data.load_images(CELEBA, 32, tmp_path_factory.mktemp("cache"))


@needs_celeba
def test_the_shared_pictures_load_whole_and_in_order(celeba):
    assert celeba.shape == (8000, 3, 32, 32)
    with zipfile.ZipFile(CELEBA) as archive:
        last = max(name for name in archive.namelist() if name.endswith(".jpg"))
        assert np.array_equal(celeba[-1].numpy(), data.decode(archive, last, 32))


@needs_celeba
def test_a_black_picture_scores_the_papers_6_db_on_real_faces(celeba):
    image = celeba[-2000:].float() / 255
    assert abs(losses.psnr(torch.zeros_like(image), image).mean() - 6.08) < 0.15


@needs_gpu
def test_a_gpu_trains_resumes_and_agrees_with_the_cpu(capsys):
    words = ["--epochs", 1, "--precision", "float32", "--out", "gpu", "--device", "cuda", *TINY[:-2]]
    assert command(*words) == 0 and command("--resume", "--out", "gpu", "--epochs", 2) == 0
    assert command("--evaluate", "gpu/best.pt", "--device", "cpu", "--json", "cpu.json") == 0
    cpu, gpu = (json.loads(Path(name).read_text()) for name in ("cpu.json", "gpu/results.json"))
    assert abs(cpu["psnr_hole"] - gpu["psnr_hole"]) < 0.01


# === How fast it is: python test_inpaint.py =======================================================


def median_ms(functions, rounds):
    """Milliseconds of each function, the median over rounds in which they take turns, so that drift hits all alike."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: float(np.median(values[1:])) for name, values in times.items()}


def compare_ssim():
    """Forward and backward, beside the peers that are installed."""
    print("\nSSIM, forward and backward       ", "ms, and how many times as fast ours is", sep="")
    for shape in ((64, 3, 64, 64), (32, 3, 128, 128)):
        x, y = torch.rand(shape), torch.rand(shape)
        functions = {"ours": lambda a, y=y: losses.ssim(a, y).mean()}
        for module in ("pytorch_msssim", "piq"):
            try:
                peer = __import__(module)
                functions[module] = lambda a, y=y, peer=peer: peer.ssim(a, y, data_range=1.0)
            except ImportError:
                print(f"  ({module} is not installed)")
        found = median_ms({name: lambda f=f, x=x: f(x.clone().requires_grad_()).backward() for name, f in functions.items()}, 15)
        print(f"  {shape!s:<22}", "   ".join(f"{name} {ms:.1f} ({ms / found['ours']:.2f})" for name, ms in found.items()))


def plain_decode(file, res):
    """The loop that everybody writes first."""
    pixels = []
    with zipfile.ZipFile(file) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".jpg")):
            image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((res, res), Image.Resampling.LANCZOS)
            pixels.append(np.asarray(image))
    return np.stack(pixels)


def drawn_zip(path, count=4000):
    """A zip like CelebA's: `count` JPEGs of 178 x 218 pixels."""
    faces = data.synthetic_faces(200, 178, 0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            stream = io.BytesIO()
            data.to_picture(F.pad(faces[i % 200][None].float(), (0, 0, 20, 20), mode="replicate")[0].to(torch.uint8)).save(stream, "JPEG", quality=90)
            archive.writestr(f"{i:06d}.jpg", stream.getvalue())
    return path


def compare_decoding(folder):
    """Reading a data set for the first time."""
    print("\ndecoding to 64 px                pictures/s, and how many times as fast ours is")
    zips = {"drawn JPEGs, 178 x 218": drawn_zip(folder / "drawn.zip")} | ({"CelebA, 89 x 109": CELEBA} if CELEBA.exists() else {})
    for name, file in zips.items():
        count = len(data.list_pictures(file))

        def ours(file=file):
            shutil.rmtree("cache", ignore_errors=True)
            data.load_images(file, 64)

        found = median_ms({"plain loop": lambda file=file: plain_decode(file, 64), "load_images": ours}, 3)
        rates = {way: 1000 * count / ms for way, ms in found.items()}
        print(f"  {name:<30} plain loop {rates['plain loop']:.0f}   load_images {rates['load_images']:.0f} ({rates['load_images'] / rates['plain loop']:.2f})")


class DecodeEachTime(torch.utils.data.Dataset):
    """What a learner would write: a JPEG is decoded each time it is asked for."""

    def __init__(self, file, res):
        self.file, self.res, self.archive = file, res, None
        self.names = [name for name, *_ in data.list_pictures(file)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        self.archive = self.archive or zipfile.ZipFile(self.file)
        image = data.central_square(Image.open(io.BytesIO(self.archive.read(self.names[i]))).convert("RGB"), self.res)
        image = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
        return image.flip(2) if torch.rand(()) < 0.5 else image


def bench_run(model, device, **changed):
    """A run with the defaults of a model at 64 px."""
    args = inpaint.parser().parse_args(["--model", model, "--res", "64", "--act", "swish"])
    return inpaint.build(inpaint.training_options(args) | changed, device)


def finish(device):
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare_training(folder, device, steps=24):
    """Images/s: the bare step on one constant batch, the training loop, and the way a learner would write it."""
    print(f"\ntraining at 64 px on {device.type}       images/s, median of turns")
    file = CELEBA if CELEBA.exists() else drawn_zip(folder / "learner.zip", 2000)
    pixels = data.load_images(file, 64)
    for model in ("unet", "gan"):
        run, in_float32 = bench_run(model, device), bench_run(model, device, precision="float32")
        batch = run.options["batch"]
        training = data.settle(pixels[: steps * batch].clone(), device)
        image = training[:batch].to(device).float().contiguous(memory_format=torch.channels_last) / 255
        mask = data.center_hole(64, 0.3).expand(batch, 1, 64, 64).to(device)
        naive = bench_run(model, device, precision="float32")
        for network in (naive.generator, naive.discriminator):
            network.to(memory_format=torch.contiguous_format) if network else None
        loader = torch.utils.data.DataLoader(DecodeEachTime(file, 64), batch, shuffle=True, num_workers=2, drop_last=True)

        def bare(run=run, image=image, mask=mask):
            for _ in range(steps):
                inpaint.training_step(run, image, mask)
            finish(device)

        def loop(run=run, training=training, batch=batch):
            inpaint.train_epoch(run, training, batch)

        def learner(naive=naive, loader=loader, mask=mask):
            for image in itertools.islice(loader, steps):
                inpaint.training_step(naive, image.to(device), mask)
            finish(device)

        ways = {"bare step": bare, "our loop": loop, "our loop, float32": lambda r=in_float32, t=training, b=batch: loop(r, t, b), "DataLoader, float32": learner}
        found = {name: 1000 * steps * batch / ms for name, ms in median_ms(ways, 5).items()}
        print(f"  {model:<6}", "   ".join(f"{name} {rate:.0f}" for name, rate in found.items()))
        print(f"         the loop reaches {found['our loop'] / found['bare step']:.1%} of the bare step, {found['our loop'] / found['DataLoader, float32']:.2f} times the DataLoader")


def one_size(device, change, steps=3):
    """(milliseconds a picture, peak memory in MB) of the U-Net's step with 16 pictures, in a process of its own."""
    run, res = bench_run("unet", device, **change), change["res"]
    image = torch.rand(16, 3, res, res, device=device).contiguous(memory_format=torch.channels_last)
    mask = data.center_hole(res, 0.3).to(device)
    ms = median_ms({"step": lambda: (inpaint.training_step(run, image, mask), finish(device))}, steps)["step"]
    on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    status = Path("/proc/self/status")  # getrusage would tell the parent's peak here
    return ms / 16, on_gpu / 2**20 or (int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1024 if status.exists() else math.nan)


def compare_sizes(device):
    """How the U-Net's cost grows."""
    print("\nU-Net, one step of 16 pictures      ms a picture, and peak memory of the process")
    context = torch.multiprocessing.get_context("spawn")
    for name, changes in {"res": [{"res": r, "width": 24} for r in (64, 128, 256)], "width": [{"res": 64, "width": w} for w in (12, 24, 48)]}.items():
        cells = []
        for change in changes:
            with context.Pool(1) as pool:
                ms, memory = pool.apply(one_size, (device, change))
            cells.append(f"{change[name]}: {ms:.1f} ms, {memory:.0f} MB")
        print(f"  by {name:<6}", "   ".join(cells))


def benchmark():
    """All that this project measures of its own speed, as tables."""
    import platform
    import tempfile

    device = inpaint.choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, {os.cpu_count()} cores, bfloat16 {'fast' if inpaint.fast_bfloat16(device) else 'not fast'}; Python {platform.python_version()},"
          f" torch {torch.__version__}, numpy {np.__version__}, Pillow {Image.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        compare_ssim()
        compare_decoding(Path(folder))
        compare_training(Path(folder), device)
        compare_sizes(device)
        os.chdir(HERE)


if __name__ == "__main__":
    benchmark()
