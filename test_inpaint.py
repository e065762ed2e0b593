"""What this project promises, one test for each promise, in the order of its files.

    python -m pytest                       everything quick, about a minute
    SLOW=1 python -m pytest                also twenty kills, a thousand damaged files, large photos, torchrun
    CELEBA=img_align_celeba.zip python -m pytest     also what needs real faces
    python -m pytest -v                    reads as the list of promises
"""

import csv
import errno
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageDraw, ImageSequence

import data
import inpaint
import losses
import models
from data import InputError

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TINY = ["--res", "32", "--width", "4", "--depth", "3", "--batch", "8", "--device", "cpu"]
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")
needs_celeba = pytest.mark.skipif(not os.environ.get("CELEBA"), reason="CELEBA=FOLDER_OR_ZIP runs it")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
no_windows = pytest.mark.skipif(os.name == "nt", reason="not on Windows")


@pytest.fixture(autouse=True, scope="session")
def small_numbers():
    """Few drawn faces and few patches, so that many small runs are quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SYNTHETIC", 40)
        patch.setattr(losses, "PATCHES", 512)
        yield


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Each test has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def faces():
    """24 drawn faces, float (24, 3, 64, 64)."""
    return data.synthetic_faces(24, 64, 1).float() / 255


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a finished small run of a U-Net."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    inpaint.main(["--epochs", "2", "--out", str(folder), *TINY])
    return folder


def command(*argv):
    """main(argv) -> its exit code."""
    try:
        inpaint.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code or 0
    return 0


def options_for(model="unet", *words, **changed):
    """The options that the command line would make, for a small network."""
    given = vars(inpaint.parser().parse_args(["--model", model, *TINY, *words]))
    del given["device"]
    return inpaint.recipe(given | {"precision": "float32"} | changed)


def write_photos(folder, count=12, size=96, suffix=".jpg"):
    """Drawn faces as picture files 000.jpg, 001.jpg, ..."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, face in enumerate(data.synthetic_faces(count, size, 3)):
        data.to_picture(face).save(folder / f"{i:03d}{suffix}", quality=92)
    return folder


def encoded(picture, kind="PNG", **more):
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **more)
    return stream.getvalue()


def contents(folder):
    """{file below a folder: (its bytes, when it was written)}."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def complaints(told):
    """What is on stderr but for progress, which a slow machine shows, and that `told` takes more pictures."""
    usual = ("drawing", "reading", "epoch", "measuring", "a fresh discriminator", "told is left out: ")
    return [line for line in told.splitlines() if not line.startswith(usual)]


def failing(error, work=None, times=0):
    """A function that works so many times and then raises the error."""
    count = itertools.count()

    def work_or_fail(*given, **named):
        if next(count) >= times:
            raise error
        return work(*given, **named)

    return work_or_fail


def spied(patch, owner, name):
    """What a function is given from now on: a list that grows by a tuple with each call."""
    calls = []
    function = getattr(owner, name)

    def note(*given, **named):
        calls.append(given)
        return function(*given, **named)

    patch.setattr(owner, name, note)
    return calls


# === data.py: the hole ============================================================================


@pytest.mark.parametrize("res, side, corner", [(64, 19, 22), (128, 38, 45), (32, 10, 11), (256, 77, 89)])
def test_the_hole_is_a_centred_square_of_30_percent_of_the_side(res, side, corner):
    mask = data.center_hole(res, 0.3)
    assert mask.shape == (1, 1, res, res)
    assert mask.sum() == side**2
    assert mask[0, 0, corner : corner + side, corner : corner + side].all()


def test_damage_is_white_in_the_hole_and_paste_brings_the_known_pixels_back(faces):
    mask = data.center_hole(64, 0.3)
    other = faces / 9 - 2
    assert torch.equal(data.damage(faces, mask), torch.where(mask > 0, torch.ones(()), faces))
    assert torch.equal(data.paste(other, faces, mask), torch.where(mask > 0, other, faces))


def test_holes_for_photos_are_central_one_side_is_the_papers_and_half_are_squares():
    boxes = data.random_boxes(2000, 64, 0.3, torch.Generator().manual_seed(0))
    height, width = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert (torch.maximum(height, width) == 19).all()
    for side in (height, width):
        assert side.min() == 4
    assert 0.45 < (boxes == torch.tensor([22, 22, 41, 41])).all(1).float().mean() < 0.58
    assert ((boxes[:, :2] + boxes[:, 2:] - 64).abs() <= 1).all()
    assert torch.equal(data.box_mask(boxes, 64).sum((1, 2, 3)).long(), height * width)


# === data.py: drawn faces, split and batches ======================================================


def test_drawn_faces_are_the_same_for_a_seed_and_differ_between_faces():
    first = data.synthetic_faces(20, 64, 0)
    assert first.dtype == torch.uint8
    assert first.shape == (20, 3, 64, 64)
    assert torch.equal(first, data.synthetic_faces(20, 64, 0))
    assert not torch.equal(first, data.synthetic_faces(20, 64, 1))
    assert (first[1:].float() - first[:-1].float()).abs().mean((1, 2, 3)).min() > 5


def test_the_split_is_by_order(faces):
    training, validation = data.split(faces, 0.25)
    assert torch.equal(training, faces[:18])
    assert torch.equal(validation, faces[18:])


def test_batches_hold_the_pictures_in_the_given_order_mirrored_where_asked(faces):
    pixels = (faces * 255).round().to(torch.uint8)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    flip = torch.arange(24) % 2 == 0
    parts = list(data.batches(data.to_gpu_if_it_fits(pixels, CPU), 8, order, flip, CPU))
    expected = pixels[order].float() / 255
    expected[flip] = expected[flip].flip(3)
    assert [len(part) for part in parts] == [8, 8, 8]
    assert torch.equal(torch.cat(parts), expected)


def test_on_a_macs_gpu_tensors_are_contiguous_and_only_cuda_copies_without_waiting(faces, monkeypatch):
    assert data.memory_format(torch.device("mps")) == torch.contiguous_format
    assert data.memory_format(torch.device("cuda")) == torch.channels_last
    copies, real = [], torch.Tensor.to

    def noted(tensor, *given, **named):
        copies.append(named)
        return real(tensor, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    for layout in (torch.contiguous_format, torch.channels_last):
        monkeypatch.setattr(data, "memory_format", lambda device, layout=layout: layout)
        order, flip = torch.arange(8), torch.zeros(8, dtype=torch.bool)
        (image,) = data.batches((faces[:8] * 255).byte(), 8, order, flip, CPU)
        assert image.is_contiguous(memory_format=layout)
    assert copies
    assert not any(named.get("non_blocking") for named in copies)


def test_framing_keeps_three_tenths_and_zooms_turns_and_moves_the_others():
    line = (torch.arange(64) + 0.5) / 32 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack([y, x, 0 * x])[None] / 4 + 0.5  # its colours say where they were
    still = torch.tensor([[0.29, 0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(data.frame(plane, still), plane, atol=1e-5)
    inner = slice(24, 40)

    def seen(zoom, angle, across, down):
        """What a framing does: the middle's place, and how far a step down goes down and to the right."""
        framed = (data.frame(plane, torch.tensor([[0.31, zoom, angle, across, down]]))[0, :2] - 0.5) * 4
        step = framed[:, inner, inner].diff(dim=1).mean((1, 2)) * 32
        return [*framed[:, 31:33, 31:33].mean((1, 2)).tolist(), *step.tolist()]

    middle = (0.5, 0.5, 0.5, 1 / 7)
    for framing, expected in (
        (middle, (0, 0, 1, 0)),
        ((0, *middle[1:]), (0, 0, 1.5, 0)), ((1, *middle[1:]), (0, 0, 1 / 1.5, 0)),
        ((0.5, 0, 0.5, 1 / 7), (0, 0, math.cos(math.radians(5)), math.sin(math.radians(5)))),
        ((0.5, 0.5, 0, 1 / 7), (0, -0.3, 1, 0)), ((0.5, 0.5, 1, 1 / 7), (0, 0.3, 1, 0)),
        ((0.5, 0.5, 0.5, 0), (-0.1, 0, 1, 0)), ((0.5, 0.5, 0.5, 1), (0.6, 0, 1, 0)),
    ):  # fmt: skip
        assert seen(*framing) == pytest.approx(expected, abs=0.01), framing


# === data.py: one photograph ======================================================================


@pytest.mark.parametrize("mode, kind, clear", [
    ("L", "PNG", None), ("1", "PNG", None), ("LA", "PNG", None), ("RGB", "BMP", None), ("RGBA", "PNG", None),
    ("P", "GIF", None), ("CMYK", "JPEG", None), ("YCbCr", "JPEG", None), ("I;16", "PNG", None),
    ("RGB", "PNG", (1, 2, 3)),
])  # fmt: skip
def test_every_kind_of_colour_becomes_rgb_and_16_bits_are_divided_and_not_clipped(mode, kind, clear):
    top, dtype = (65535, "uint16") if mode == "I;16" else (255, "uint8")
    picture = Image.fromarray((np.linspace(0, top, 40)[None].repeat(40, 0)).astype(dtype))
    if mode != "I;16":
        picture = picture.convert("RGB").convert(mode)
    content = encoded(picture, kind, **({} if clear is None else {"transparency": clear}))
    pixels = data.to_tensor(data.open_photo(content)).float()
    assert pixels.shape == (3, 40, 40)
    assert pixels[:, :, :4].mean() < 50
    assert pixels[:, :, -4:].mean() > 205
    assert mode == "1" or abs(pixels[:, :, 18:22].mean() - 127) < 12, "the middle of the ramp must stay grey"


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_32_bits_are_refused_because_their_range_is_unknown(dtype):
    content = encoded(Image.fromarray(np.ones((40, 40), dtype)), "TIFF")
    with pytest.raises(InputError, match=r"its range is unknown \(mode [FI]\): save it with 8 or 16 bits"):
        data.open_photo(content)


def test_16_bits_are_known_where_pillow_names_them_32():
    values = np.full((40, 40), 65535, ">u2")
    assert data.open_photo(b"P5 40 40 65535\n" + values.tobytes()).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("brightest, told", [(8191, 1), (8192, 0)])
def test_16_bits_that_look_like_12_are_told_once(brightest, told, capsys):
    data.say_once.cache_clear()
    content = encoded(Image.fromarray(np.full((40, 40), brightest, "uint16")))
    for _ in range(2):
        assert data.open_photo(content).getpixel((0, 0)) == (32, 32, 32)
    line = "a 16-bit picture is nearly black: it looks like 10 or 12 bits, but 16 are assumed\n"
    assert capsys.readouterr().err == line * told


def test_exif_orientation_turns_the_picture_upright():
    image, exif = Image.new("RGB", (60, 40), "black"), Image.Exif()
    image.paste("white", (0, 0, 60, 20))
    exif[0x0112] = 6  # stored lying on its side, and told to be turned by 90 degrees clockwise
    content = encoded(image.rotate(90, expand=True), "JPEG", exif=exif, quality=95)
    for shortest in (None, 16):  # also when it is decoded at half its size
        pixels = np.asarray(data.central_square(data.open_photo(content, shortest), 32))
        assert pixels[:12].mean() > 240
        assert pixels[20:].mean() < 15


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_becomes_white_whatever_colour_is_hidden_under_it(kind):
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    image.paste((0, 90, 0, 0), (0, 0, 20, 40))  # unseen green
    image.paste((200, 0, 0, 128), (20, 20, 40, 40))
    content = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    picture = data.open_photo(content)
    assert picture.getpixel((5, 5)) == (255, 255, 255)
    assert picture.getpixel((30, 5)) == (200, 0, 0)
    assert picture.getpixel((30, 30)) in ((227, 127, 127), (227, 126, 126))
    assert data.open_photo(content, behind="black").getpixel((5, 5)) == (0, 0, 0)


def test_the_central_square_is_cut_out():
    for size, box in (((300, 100), (100, 0, 200, 100)), ((100, 300), (0, 100, 100, 200))):
        image = Image.new("RGB", size, "black")
        image.paste("white", box)
        assert (np.asarray(data.central_square(image, 32))[1:-1, 1:-1] > 240).all()


def test_reduced_jpeg_decoding_is_used_and_differs_by_less_than_a_level():
    for face in data.synthetic_faces(4, 178, 5):
        content = encoded(data.to_picture(F.pad(face, (0, 0, 20, 20))), "JPEG", quality=90)
        fast, full = data.open_photo(content, 64), data.open_photo(content)
        assert (fast.size, full.size) == ((89, 109), (178, 218))
        pair = [np.asarray(data.central_square(picture, 64), float) for picture in (fast, full)]
        assert np.abs(pair[0] - pair[1]).mean() < 1


def test_crop_resize_scales_a_box_with_corners_between_pixels_and_repeats_the_border_outside(faces):
    face, line, inner = faces[0], torch.arange(64.0), (slice(None), slice(3, -3), slice(3, -3))
    assert (data.crop_resize(face, (5, 9, 25, 40), (20, 31)) - face[:, 9:40, 5:25]).abs().max() < 1e-6
    outside = data.crop_resize(face, (-3, -2, 134, 68), (137, 70))
    assert (outside - F.pad(face, (3, 70, 2, 4), mode="replicate")).abs().max() < 1e-6
    board = ((line[:, None] + line) % 2)[None]  # shrunk it is grey: to pick pixels would give 0 or 1
    assert (data.crop_resize(board, (0, 0, 64, 64), (8, 8)) - 0.5).abs().max() < 0.02
    assert (data.crop_resize(face, (0, 0, 64, 64), (16, 16)).mean() - face.mean()).abs() < 0.01
    plane = (line + 2 * line[:, None])[None]
    half = data.crop_resize(plane, (10.5, 20.5, 30.5, 40.5), (20, 20)) - plane[:, 20:40, 10:30]
    assert (half[inner] - 1.5).abs().max() < 1e-3
    third, at = data.crop_resize(plane, (10.25, 20.5, 46.25, 56.5), (12, 12)), 3 * torch.arange(12.0) + 1
    assert (third - (10.25 + at) - 2 * (20.5 + at[:, None]))[inner].abs().max() < 0.1


# === data.py: a folder or zip =====================================================================


def photos(count, packed=False):
    """d, a folder of drawn faces of 24 x 24 pixels; or d.zip with the same names."""
    folder = write_photos("d", count, 24)
    return zip_folder(folder) if packed else folder


def zip_folder(folder, prefix=""):
    with zipfile.ZipFile(f"{folder}.zip", "w") as archive:
        for file in filter(Path.is_file, folder.rglob("*")):
            archive.writestr(prefix + file.relative_to(folder).as_posix(), file.read_bytes())
    return Path(f"{folder}.zip")


def each_alone(folder, numbers, res=32):
    """What those pictures should be: each one opened and cut alone."""
    opened = [data.open_photo((folder / f"{i:03d}.jpg").read_bytes(), res) for i in numbers]
    return torch.stack([data.to_tensor(data.central_square(picture, res)) for picture in opened])


def forbid(patch, owner, name, ending):
    """Whoever reads what has that ending meets a PermissionError."""

    def guarded(path, real=getattr(owner, name)):
        if str(path).endswith(ending):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    patch.setattr(owner, name, guarded)


def cache_files():
    return sorted(Path("cache").iterdir()) if Path("cache").exists() else []


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_or_zip_becomes_one_tensor_in_the_order_of_names(packed):
    path = photos(12, packed)
    for _ in range(2):  # the second time from the cache
        pixels = data.load_images(path, 32)
        assert torch.equal(pixels, each_alone(Path("d"), range(12)))
    assert len(cache_files()) == 1


@pytest.mark.parametrize("prefix", ["", "./"])  # some programs write ./ before the names in a zip
def test_every_picture_is_found_to_the_bottom_other_kinds_are_told_and_litter_is_not(prefix, capsys):
    folder, names = Path("d"), sorted(["b.jpg", "a/ä ö.png", "a/c/日本.JPG", "z 1.webp", "1.jfif"])
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(Image.new("RGB", (20, 20), "red")))
    ours = ("runs/x/grid.png", "a/cache/c.jpg", "restored/me.png", "runs/log.csv")
    for litter in ("__MACOSX/b.jpg", "a/@eaDir/1.jpg", "$RECYCLE.BIN/1.png", ".hidden/runs/2.png", *ours):
        (folder / litter).parent.mkdir(parents=True, exist_ok=True)
        (folder / litter).write_bytes(b"no picture")
    for name in (".hidden.jpg", ".notes", "a/1.heic", "2.HEIC", "readme"):
        (folder / name).write_bytes(b"no picture")
    path = zip_folder(folder, prefix)
    for place, start in ((folder, ""), (path, prefix)):
        assert [name for name, _ in data.find_pictures(place)] == [start + name for name in names]
        passed_over, skipped = complaints(capsys.readouterr().err)
        assert "pictures in folders named runs, restored or cache are passed over (3)" in passed_over
        assert "3 files of other kinds are skipped (2 .heic, 1 no suffix)" in skipped
    assert torch.equal(data.load_images(folder, 32), data.load_images(path, 32))


@no_windows
def test_a_linked_folder_is_followed_and_a_link_back_is_not():
    write_photos("elsewhere/deep", 1)
    write_photos("d", 1)
    Path("d/linked").symlink_to(Path("elsewhere").absolute())
    Path("d/loop").symlink_to(Path("d").absolute())
    assert [name for name, _ in data.find_pictures(Path("d"))] == ["000.jpg", "linked/deep/000.jpg"]


@no_windows
def test_a_link_to_nothing_is_named_as_that_and_other_kinds_may_point_anywhere():
    photos(2)
    Path("d/notes.txt").symlink_to("nothing")
    assert len(data.load_images("d", 32)) == 2
    Path("d/lost.jpg").symlink_to("nothing")
    with pytest.raises(InputError, match="d/lost.jpg cannot be read: it points to nothing"):
        data.load_images("d", 32)


@pytest.mark.parametrize("packed", [False, True])
def test_up_to_5_percent_of_broken_pictures_are_left_out_and_named(packed, capsys):
    folder = photos(60)
    whole = each_alone(folder, [i for i in range(60) if i not in (7, 50)])
    (folder / "007.jpg").write_bytes(b"not a jpeg")
    (folder / "050.jpg").write_bytes((folder / "051.jpg").read_bytes()[:300])
    path = zip_folder(folder) if packed else folder
    assert torch.equal(data.load_images(path, 32), whole)
    told = capsys.readouterr().err
    assert "2 of 60 pictures are broken and left out" in told
    assert re.search(r"007.jpg: not a picture that can be read \([\w ]+\)[;\n]", told), "no address in memory"
    assert "050.jpg: " in told
    assert torch.equal(data.load_images(path, 32), whole), "from the cache"
    assert "2 of 60 pictures are broken and left out" in capsys.readouterr().err


def test_more_than_5_percent_of_broken_pictures_are_refused_and_nothing_is_kept():
    folder = photos(60)
    for i in (7, 20, 30, 50):
        (folder / f"{i:03d}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="4 of 60 pictures are broken, the first are 007.jpg"):
        data.load_images(folder, 32)
    assert not cache_files()


def test_a_damaged_entry_of_a_zip_is_a_broken_picture(capsys):
    raw = photos(30, packed=True).read_bytes()
    middle = len(raw) // 2
    Path("d.zip").write_bytes(raw[:middle] + bytes(8) + raw[middle + 8 :])
    assert len(data.load_images("d.zip", 32)) == 29
    assert "1 of 30 pictures are broken" in capsys.readouterr().err


@pytest.mark.parametrize("owner, name, place", [(Path, "read_bytes", "013.jpg"), (os, "scandir", "closed")])
def test_what_cannot_be_read_stops_with_its_name_and_is_not_left_out(owner, name, place, monkeypatch):
    write_photos(photos(30) / "closed", 2)
    with monkeypatch.context() as patch:
        forbid(patch, owner, name, place)
        with pytest.raises(InputError, match=rf"{place} cannot be read \(Permission denied\)"):
            data.load_images("d", 32)
    assert not cache_files()
    assert len(data.load_images("d", 32)) == 32


def test_a_cache_that_is_not_whole_is_made_anew():
    first = data.load_images(photos(4), 32).clone()
    (file,) = cache_files()
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert torch.equal(data.load_images("d", 32), first)
        assert file.read_bytes() == whole


def test_a_changed_file_makes_its_own_cache_stale_and_no_other():
    for path, res in ((write_photos("other/d", 1), 32), (photos(4), 64)):
        data.load_images(path, res)
    others = set(cache_files())
    first, old = data.load_images("d", 32).clone(), set(cache_files())
    Image.new("RGB", (40, 40), "blue").save("d/003.jpg")
    second, new = data.load_images("d", 32), set(cache_files())
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3], second[3])
    assert old & new == others
    assert len(new) == len(old) == 3


def test_a_cache_that_cannot_be_kept_is_a_warning_that_names_the_place(monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    assert torch.equal(data.load_images(photos(4), 32), each_alone(Path("d"), range(4)))
    assert "warning: no cache can be kept in cache (" in capsys.readouterr().err


# === data.py: writing =============================================================================


def test_a_file_whose_writing_is_stopped_by_ctrl_c_is_as_it_was_before(monkeypatch):
    data.save("f", b"old")
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        data.save("f", b"new")
    assert Path("f").read_bytes() == b"old"
    assert len(list(Path().iterdir())) == 1


def test_a_file_that_another_program_holds_is_moved_when_it_lets_go_or_given_up_in_two_seconds(monkeypatch):
    waits = []
    monkeypatch.setattr(data, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    held = PermissionError(13, "The process cannot access the file")
    replace = Mock(wraps=os.replace, side_effect=[held, held, held, DEFAULT])
    monkeypatch.setattr(os, "replace", replace)
    data.save("f", b"new")
    assert Path("f").read_bytes() == b"new"
    assert len(waits) == 3
    replace.side_effect = held
    with pytest.raises(PermissionError):
        data.save("g", b"new")
    assert 1.5 < sum(waits[3:]) < 3
    assert [file.name for file in Path().iterdir()] == ["f"]


# === data.py: grids, charts and the screen ========================================================


def test_a_grid_shows_its_pictures_pixel_by_pixel_and_labels_them(faces):
    pixels = np.asarray(data.grid([("damaged", faces[:3]), ("original", faces[3:6])]))
    face = np.asarray(data.to_picture(faces[5]).resize((128, 128), Image.Resampling.NEAREST))
    assert (pixels[-132:-4, -132:-4] == face).all()
    labels = pixels[:, : 3 - 3 * 132 - 4]
    assert labels.min() < 128
    assert labels.max() > 250


def test_pictures_beside_each_other_have_one_height_and_their_titles(faces):
    wide = data.to_picture(faces[0]).resize((900, 100))
    row = data.beside({"a": data.to_picture(faces[1]), "a title that is long": wide}, 200)
    assert row.size == (4 + 200 + 4 + 512 + 4, 28 + 200 + 4)
    pixels = np.asarray(row)
    face = np.asarray(data.to_picture(faces[1]).resize((200, 200)))
    assert (pixels[28:228, 4:204] == face).all()
    assert pixels[:28].min() < 128


def test_a_film_shows_five_frames_a_second_and_the_last_one_for_two_seconds():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    film = Image.open(io.BytesIO(data.gif(frames)))
    assert [frame.info["duration"] for frame in ImageSequence.Iterator(film)] == [200, 200, 2000]


@pytest.mark.parametrize("middle", [1.0, 0.0, 2.0])
def test_the_names_in_a_chart_neither_overlap_nor_leave_it(middle, monkeypatch):
    texts = spied(monkeypatch, ImageDraw.ImageDraw, "text")
    curves = {f"name {i}": [(0, 1), (i % 3, middle + i * 1e-6)] for i in range(14)}
    sheet = data.chart("x", curves)
    boxes = {text: pen.textbbox(place, text, font, *end) for pen, place, text, _, font, *end in texts}
    names = sorted((boxes[name] for name in curves), key=lambda box: box[1])
    assert all(above[3] <= below[1] + 1 for above, below in itertools.pairwise(names))
    x0, y0, x1, y1 = zip(*boxes.values())
    assert min(x0 + y0) >= 0
    assert max(x1) <= sheet.width
    assert max(y1) <= sheet.height


def test_the_progress_line_is_written_over_never_wraps_and_is_wiped_away(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    for i in range(99):
        monkeypatch.setitem(data.screen_line, "time", 0.0)
        data.progress(f"step {i} " + "long " * 20 * (i == 50))
    data.say("done")
    *lines, wiped, last = screen.getvalue().split("\r")[1:]
    assert len(lines) == 99
    assert max(map(len, lines)) < 40
    assert lines[50].startswith("step 50 long")
    assert len(lines[51]) >= len(lines[50].rstrip())
    assert not wiped.strip()
    assert last == "done\n"


# === models.py ====================================================================================

HOLE = data.center_hole(64, 0.3)


def test_swish_is_x_times_sigmoid_and_agrees_with_torch():
    x = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    values = models.Swish()(x)
    assert torch.allclose(values, x / (1 + torch.exp(-x))) and torch.allclose(values, F.silu(x))


@pytest.mark.parametrize("act, kind", [("relu", torch.nn.ReLU), ("swish", models.Swish)])
@pytest.mark.parametrize("res, depth", [(32, 1), (32, 5), (64, 4), (64, 6), (128, 5), (256, 5)])
def test_the_unet_paints_from_0_to_1_and_tells_a_white_hole_from_a_white_wall(res, depth, act, kind):
    torch.manual_seed(0)  # so few relus may all be dead for another seed
    network, mask = models.UNet(depth, 4, act), data.center_hole(res, 0.3)
    output = network(torch.rand(2, 3, res, res), mask)
    assert output.shape == (2, 3, res, res) and 0 <= output.min() and output.max() <= 1
    kinds = [type(layer) for layer in network.modules() if isinstance(layer, torch.nn.ReLU | models.Swish)]
    assert kinds == [kind] * (2 * depth - 1)
    white = torch.ones(1, 3, res, res)
    assert not torch.allclose(network.eval()(white, mask), network(white, 0 * mask))


@pytest.mark.parametrize("limit, levels", [(16, [8, 16, 32, 64, 128]), (2, [8, 16, 16, 16, 16])])
def test_every_level_of_the_unet_has_a_skip_and_channels_end_at_the_limit(limit, levels):
    assert models.channels(5, 8, limit) == levels and models.channels(5, 48, 2) == [48, 96, 96, 96, 96]
    network, skips = models.UNet(5, 8, "relu", limit), levels[-2::-1]
    assert [step[0].out_channels for step in network.down] == levels
    assert [step[0].out_channels for step in network.up] == skips and network.keep.in_channels == 4
    came_in = [step[0].in_channels for step in (*network.up, [network.paint])]
    assert came_in == [levels[-1], *(2 * skip for skip in skips)]


def test_before_any_step_keep_hands_on_the_known_pixels_and_grey_for_the_hole():
    network, image, mask = models.UNet(3, 4, "relu"), torch.rand(2, 3, 32, 32), data.center_hole(32, 0.3)
    torch.nn.init.zeros_(network.paint.weight), torch.nn.init.zeros_(network.paint.bias)
    output = network(data.damage(image, mask), mask)
    assert torch.allclose(output * mask, 0.5 * mask.expand_as(output))
    known = (output - torch.sigmoid(5 * image - 2.5)) * (1 - mask)
    assert known.abs().max() < 1e-6, "also the pixels around the hole"


@pytest.mark.parametrize("res", [32, 64, 128, 256])
def test_the_discriminator_has_log2_res_minus_2_halvings_one_logit_and_a_feature_for_each(res):
    network = models.Discriminator(res, 4)
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    halvings = int(math.log2(res) - 2)
    assert [layer.stride[0] for layer in convolutions] == [2] * halvings + [1]
    assert convolutions[0].in_channels == 3
    logits, features = network(torch.rand(3, 3, res, res))
    assert logits.shape == (3,)
    expected = [(3, 4 * min(2**level, 16), res >> level + 1, res >> level + 1) for level in range(halvings)]
    assert [feature.shape for feature in features] == expected


def test_the_middle_is_the_central_half_with_all_of_the_hole_and_its_discriminator_halves_once_less(faces):
    assert torch.equal(models.middle(faces), faces[:, :, 16:48, 16:48])
    assert models.middle(HOLE).sum() == HOLE.sum()
    halvings = [len(fresh("gan", judge=judge).discriminator.down) for judge in ("middle", "restored")]
    assert halvings == [2, 3]


def test_augment_is_its_formula_picture_by_picture(faces):
    pictures = faces[:5]
    look = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    x = pictures.double().numpy()
    u = 2 * look.double().numpy() - 1
    b, s, c = (z[:, None, None, None] for z in (u[:, 0] / 2, 1 + u[:, 1], 1 + u[:, 2] / 2))
    grey = x.mean(1, keepdims=True)
    mean = x.mean((1, 2, 3), keepdims=True)
    coloured = torch.from_numpy(mean + b + c * (grey - mean + s * (x - grey)))
    assert (models.augment(pictures, look) - moved(coloured, look)).abs().max() < 1e-5


def moved(pictures, look):
    """Pictures moved by up to a thirty-second of their side by slices, as `augment` does it by matrices."""
    side = pictures.shape[-1]
    parts = []
    for picture, numbers in zip(pictures, look):
        down, right = (round(float(2 * number - 1) * (side // 32)) for number in numbers[3:])
        known = picture[:, max(0, down) : side + min(0, down), max(0, right) : side + min(0, right)]
        beyond = (max(0, -right), max(0, right), max(0, -down), max(0, down))
        parts.append(F.pad(known, beyond))
    return torch.stack(parts)


def test_augment_moves_a_picture_and_its_gradient_by_exactly_the_slice(faces):
    look = torch.rand(24, 5, generator=torch.Generator().manual_seed(0))
    look[:, :3] = 0.5  # its colours stay
    look[:2, 3:] = torch.tensor([[0, 0.999], [0.999, 0]])  # as far as it goes
    found = []
    for move in (models.augment, moved):
        pictures = faces.clone().requires_grad_()
        seen = move(pictures, look)
        (seen * faces.flip(0)).sum().backward()
        found.append((seen, pictures.grad))
    for one, other in zip(*found):
        assert torch.equal(one, other)


@pytest.mark.parametrize("look", [0.0, 0.8])
def test_augment_lets_the_gradient_through(look):
    picture = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    change = functools.partial(models.augment, look=torch.full((2, 5), look, dtype=torch.float64))
    assert torch.autograd.gradcheck(change, (picture,), fast_mode=True)


@pytest.mark.parametrize("network", [models.UNet(4, 16, "swish"), models.Discriminator(32, 16)], ids=type)
def test_dcgan_starts_with_a_standard_deviation_of_two_hundredths_and_no_bias(network):
    models.dcgan_init(network)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d) and layer.weight.numel() > 500:
            assert 0.017 < layer.weight.std() < 0.023
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert abs(layer.weight.mean() - 1) < 0.025 and layer.weight.std() > 0.005
        assert getattr(layer, "bias", None) is None or (layer.bias == 0).all()


def test_smooth_filling_keeps_the_known_pixels_and_takes_any_mask(faces):
    assert torch.equal(models.harmonic(data.damage(faces, HOLE), HOLE) * (1 - HOLE), faces * (1 - HOLE))
    assert torch.equal(models.harmonic(faces, 0 * HOLE), faces)
    assert torch.isfinite(models.harmonic(faces, torch.ones_like(HOLE))).all()


def test_smooth_filling_solves_laplaces_equation_in_any_hole_and_shape_of_picture(faces):
    mask = data.box_mask(torch.tensor([[0, 10, 30, 40], [20, 20, 64, 64]]), 64)[..., :53, :]
    filled = models.harmonic(data.damage(faces[:2, :, :53], mask), mask)
    p = F.pad(filled, (1, 1, 1, 1), mode="replicate")
    around = p[..., :-2, 1:-1] + p[..., 2:, 1:-1] + p[..., 1:-1, :-2] + p[..., 1:-1, 2:]
    assert ((around / 4 - filled) * mask).abs().max() < 1e-3


def test_four_ways_to_paint_need_no_training_and_the_nearest_face_is_found_by_known_pixels_alone(faces):
    image, pixels, mean = faces[[3, 17, 23]], (faces * 255).round().byte(), faces.mean(0, keepdim=True)
    damaged, ways = data.damage(image, HOLE), models.without_training(pixels, HOLE)
    assert list(ways) == ["white hole", "smooth filling", "mean face", "nearest face"]
    expected = [damaged, models.harmonic(damaged, HOLE), mean.expand_as(image), image]
    assert all(torch.allclose(way(damaged), known, atol=1e-6) for way, known in zip(ways.values(), expected))
    assert torch.equal(models.nearest_face(data.paste(1 - image, image, HOLE), HOLE, pixels, part=7), image)
    assert torch.allclose(models.mean_face(pixels.repeat(50, 1, 1, 1)), mean, atol=1e-6)  # more than one part


# === losses.py: SSIM ==============================================================================


def ssim_pairs():
    noise, other = torch.rand(2, 3, 24, 28, generator=torch.Generator().manual_seed(0))
    ramp, flat = torch.linspace(0, 1, 28).expand(3, 24, 28), torch.ones(3, 24, 28)
    face = data.synthetic_faces(2, 32, 0).float() / 255
    return {
        "noise": (noise, other),
        "ramp and its mirror image": (ramp, ramp.flip(2)),
        "flat, bright and dark": (0.9 * flat, 0.1 * flat),
        "bright with a little noise": (1 - 0.01 * noise, 1 - 0.02 * noise.flip(1)),
        "faces": (face[0], face[1]),
        "channels that differ": (torch.stack([ramp[0], noise[1], flat[0]]), noise),
        "halves": (torch.cat([0.1 * flat, 0.9 * flat], 2), torch.cat([0.2 * flat, 0.9 * flat], 2)),
    }


@pytest.mark.parametrize("name", ssim_pairs())
def test_ssim_is_the_definition_window_by_window(name):
    pair = [picture[None] for picture in ssim_pairs()[name]]
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(x.double().numpy(), (11, 11), (2, 3)) for x in pair)
    ma, mb = ((weight * x).sum((-2, -1), keepdims=True) for x in (a, b))
    squares = (a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)
    va, vb, cov = ((weight * x).sum((-2, -1), keepdims=True) for x in squares)
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    tolerance = 2e-5 if name == "halves" else 2e-6  # float32 itself, where a flat part is far from the mean
    assert abs(losses.ssim(*pair).item() - expected.mean()) < tolerance
    assert abs(losses.ssim(pair[0].double(), pair[1].double()).item() - expected.mean()) < 1e-12


def test_ssim_is_free_of_the_range_and_dssim_is_half_of_its_distance_from_1(faces):
    other = faces.roll(1, 0)
    values = losses.ssim(faces, other)
    assert torch.allclose(losses.ssim(faces * 255, other * 255, data_range=255), values, atol=1e-6)
    assert torch.allclose(losses.dssim(faces, other), (1 - values.mean()) / 2)


def test_ssim_is_float32_under_autocast_and_keeps_float64(faces):
    x, y = faces[:2], faces[2:4]
    expected = losses.dssim(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.dssim(x, y), expected)
    assert losses.ssim(y.bfloat16(), y).dtype == torch.float32
    assert losses.ssim(y.double(), y.double()).dtype == torch.float64


def test_the_gradient_of_ssim_is_right_and_finite_on_flat_pictures():
    x, y = torch.rand(2, 1, 1, 13, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.ssim, (x.requires_grad_(), y.requires_grad_()), fast_mode=True)
    flat = torch.tensor([1.0, 0, 1]).view(3, 1, 1, 1).expand(3, 3, 16, 16).clone().requires_grad_()
    losses.dssim(flat, flat.detach() * torch.tensor([1, 1, 0.8]).view(3, 1, 1, 1)).backward()
    assert torch.isfinite(flat.grad).all()


# === losses.py: PSNR, distances, the game, the grammar ============================================


def test_psnr_has_its_closed_form_a_picture_and_a_hole_and_100_for_equal_ones_so_means_stay_finite(faces):
    x, error = torch.full((4, 3, 8, 8), 0.5), torch.tensor([0.1, 0.01, 0.5, 0]).view(4, 1, 1, 1)
    assert torch.allclose(losses.psnr(x, x + error), torch.tensor([20, 40, 6.0206, 100]), atol=1e-3)
    assert losses.psnr(faces, faces, HOLE).mean() == 100
    other, cut = faces.roll(1, 0), np.s_[:, :, 22:41, 22:41]
    for mask, part in ((None, other - faces), (HOLE, other[cut] - faces[cut])):
        expected = -10 * torch.log10(part.double().square().mean((1, 2, 3)))
        assert torch.allclose(losses.psnr(other, faces, mask).double(), expected, atol=1e-4)


@pytest.mark.parametrize("metric, x, message", [
    (losses.psnr, 255 * torch.rand(1, 3, 11, 10), "0, 1"), (losses.psnr, -torch.rand(1, 3, 11, 10), "0, 1"),
    (losses.psnr, torch.full((1, 3, 11, 10), math.nan), "nan"), (losses.psnr, torch.rand(3, 11, 10), "shape"),
    (losses.psnr, torch.ones(1, 3, 11, 10, dtype=torch.uint8), "uint8"),
    (losses.psnr, torch.rand(1, 3, 11, 9), r"\(1, 3, 11, 9\)"),
    (losses.ssim, torch.rand(1, 3, 11, 10), "11 x 11"), (losses.ssim, torch.rand(2, 3, 11, 10), "one shape"),
])  # fmt: skip
def test_psnr_refuses_what_the_paper_probably_did_and_ssim_what_has_no_whole_window(metric, x, message):
    for pair in ((x, torch.zeros(1, 3, 11, 10)), (torch.zeros(1, 3, 11, 10), x)):
        with pytest.raises(ValueError, match=message):
            metric(*pair)


def test_measure_has_a_row_for_each_metric_and_only_the_area_parts_two_of_them(faces):
    mask = data.box_mask(data.random_boxes(24, 64, 0.3, torch.Generator().manual_seed(0)), 64)
    area, output, restored = mask.mean((1, 2, 3)), faces.roll(1, 0), data.paste(faces.roll(1, 0), faces, mask)
    rows = dict(zip(losses.PER_PICTURE, losses.measure(output, restored, faces, mask), strict=True))
    assert torch.equal(rows["psnr_output"], losses.psnr(output, faces))
    assert torch.equal(rows["psnr_hole"], losses.psnr(output, faces, mask))
    assert torch.equal(rows["ssim_restored"], losses.ssim(restored, faces))
    assert torch.allclose(rows["psnr_restored"], rows["psnr_hole"] + 10 * (1 / area).log10(), atol=1e-3)


@pytest.mark.parametrize("loss, power", [(losses.l1, 1), (losses.mse, 2)])
def test_l1_and_mse_are_plain_means_until_the_hole_counts_more(loss, power, faces):
    other, mask = faces.roll(1, 0), torch.cat([HOLE.expand(16, 1, 64, 64), 1 - HOLE.expand(8, 1, 64, 64)])
    error, weight = (other - faces).double().abs() ** power, 1 + 9 * mask.double()
    assert torch.allclose(loss(other, faces, mask).double(), error.mean())
    assert torch.allclose(loss(other, faces, mask, 10).double(), (error * weight).sum() / (3 * weight.sum()))


def test_distances_gives_each_term_that_compares_pictures_and_known_is_l1_outside_the_hole_alone(faces):
    x, odd = faces.roll(1, 0), torch.rand_like(faces)
    expected = {"l1": losses.l1(x, faces, HOLE, 5), "mse": losses.mse(x, faces, HOLE, 5)}
    expected |= {"dssim": losses.dssim(x, faces), "known": losses.l1(x, faces, HOLE, 0)}
    assert losses.distances(dict.fromkeys(losses.TERMS, 7.0), x, faces, HOLE, 5) == expected
    for term in expected:
        assert losses.distances({"adversarial": 1, term: 2}, x, faces, HOLE, 5) == {term: expected[term]}
    assert torch.allclose(expected["known"], (x - faces).abs()[..., HOLE[0, 0] == 0].mean())
    for picture, value in ((x, expected["known"]), (faces, 0)):  # whatever is in the hole
        pasted = data.paste(odd, picture, HOLE)
        assert losses.distances({"known": 1}, pasted, faces, HOLE, 5) == {"known": value}


def test_the_adversarial_losses_have_their_closed_forms_and_never_overflow():
    real, fake, far = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0]), torch.tensor([1e4])
    d, e = torch.sigmoid(real), torch.sigmoid(fake)
    for s in (0, 0.1):
        expected = -((1 - s) * d.log() + s * (1 - d).log() + (1 - e).log()).mean()
        assert torch.allclose(losses.discriminator_loss(real, fake, s), expected)
    assert torch.allclose(losses.generator_loss(fake), -e.log().mean())
    assert losses.discriminator_loss(-far, far) == 2e4 and losses.generator_loss(-far) == 1e4


@pytest.mark.parametrize("text, expected", [
    ("l1", {"l1": 1}), ("mse+dssim", {"mse": 0.5, "dssim": 0.5}),
    (" 2.5*l1 + known ", {"l1": 2.5, "known": 1}),
    ("+".join(losses.TERMS), dict.fromkeys(losses.TERMS, 1 / 6)),
])  # fmt: skip
def test_the_loss_grammar(text, expected):
    assert losses.parse_loss(text) == expected


@pytest.mark.parametrize("text", ["", *"l2 l1+l1 0*l1 -1*l1 nan*l1 inf*l1 l1+ *l1 l1*2 2*3*l1 x*l1".split()])
def test_the_loss_grammar_refuses_and_says_what_is_right(text):
    with pytest.raises(ValueError, match=r"30\*l1\+adversarial"):
        losses.parse_loss(text)


# === losses.py: realism ===========================================================================


def test_specks_are_counted_in_the_hole_alone_and_smooth_or_grey_pictures_have_none(faces):
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64) * torch.tensor([1, 0.5, 0.2]).view(1, 3, 1, 1)
    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(2, 3, 64, 64)
    assert losses.specks(ramp, HOLE).tolist() == [0]
    assert losses.specks(grey, HOLE).tolist() == [0, 0]
    assert losses.specks(faces, HOLE).max() < 5, "drawn ones have a few in their irises"
    planted = ramp.repeat(4, 1, 1, 1)
    planted[0, 0, 30, 30] += 0.09  # one, of red, just enough
    planted[1, 2, 24:40:4, 24:40:4] += 0.2  # sixteen, of blue
    planted[2, 2, 24, 24] += 0.07  # too little
    planted[3, 1, 10, 10] += 0.5  # a known pixel
    assert losses.specks(planted, HOLE).tolist() == [1, 16, 0, 0]
    counted = losses.measure(planted, planted, planted, HOLE)[losses.PER_PICTURE.index("speckled")]
    assert counted.tolist() == [0, 1, 0, 0], "five or more"


def smooth(x, sigma):  # a Gaussian blur
    line = torch.exp(-torch.arange(-9.0, 10).square() / (2 * sigma**2))
    window = (torch.outer(line, line) / line.sum() ** 2).expand(3, 1, 19, 19)
    return F.conv2d(F.pad(x, (9, 9, 9, 9), mode="replicate"), window, groups=3)


def test_swd_is_the_definition_patch_by_patch(faces):
    other = smooth(faces.flip(0), 1)
    seed = torch.Generator().manual_seed(0)
    count = losses.PATCHES
    corners = [(i, j) for i in range(58) for j in range(58) if HOLE[0, 0, i : i + 7, j : j + 7].any()]
    places = torch.randint(24 * len(corners), (count,), generator=seed).tolist()
    directions = torch.randn(147, 256, generator=seed).double().numpy()
    directions /= np.sqrt((directions**2).sum(0))
    ours, theirs = np.empty((2, count, 3, 7, 7))
    for k, place in enumerate(places):
        picture, (i, j) = place % 24, corners[place // 24]
        ours[k], theirs[k] = (x[picture, :, i : i + 7, j : j + 7].numpy() for x in (other, faces))
    mean, deviation = theirs.mean((0, 2, 3), keepdims=True), theirs.std((0, 2, 3), ddof=1, keepdims=True)
    a, b = (np.sort(((x - mean) / deviation).reshape(count, -1) @ directions, axis=0) for x in (ours, theirs))
    assert losses.swd(other, faces, HOLE) == pytest.approx(np.abs(a - b).mean(), abs=1e-5)


def test_swd_is_0_for_the_same_set_and_neither_uses_nor_moves_the_random_numbers_of_a_run(faces):
    before = torch.get_rng_state()
    first = losses.swd(smooth(faces, 1), faces, HOLE)
    assert torch.equal(torch.get_rng_state(), before)
    assert losses.swd(faces, faces, HOLE) == 0
    torch.manual_seed(123)
    assert losses.swd(smooth(faces, 1), faces, HOLE) == first > 0


# === inpaint.py: the training step ================================================================


def small_batch(count=8, res=32):
    """Pictures, their holes, and looks with which `augment` changes nothing."""
    mask = data.center_hole(res, 0.3).expand(count, 1, res, res)
    return data.synthetic_faces(count, res, 7).float() / 255, mask, torch.full((count, 3, 5), 0.5)


def fresh(model="unet", *words, **changed):
    """A new run of a small network, in float32."""
    return inpaint.Run(options_for(model, *words, **changed), CPU)


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def stopped(patch, steps):
    """Let Ctrl-C come after so many training steps."""
    patch.setattr(inpaint, "training_step", failing(KeyboardInterrupt(), inpaint.training_step, steps))


def read_csv(path):
    """The rows of a table as dictionaries."""
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def results(folder):
    """What a run measured."""
    return json.loads(Path(folder, "results.json").read_text())


def last_state(folder):
    """The content of a run's last.pt."""
    return torch.load(Path(folder, "last.pt"), weights_only=True)


def test_one_batch_of_32_faces_is_overfitted():
    image, mask, looks = small_batch(32)
    run = fresh(width=16)
    for step in range(150):
        run.optimizers["generator"].param_groups[0]["lr"] = inpaint.learning_rate(4e-3, step, 150)
        inpaint.training_step(run, image, mask, looks)
    with torch.no_grad():
        output = run.generator.eval()(data.damage(image, mask), mask)
    assert losses.psnr(output, image, mask).mean() > 25, "what cannot learn 32 faces by heart has a bug"


@pytest.mark.parametrize("loss", ["adversarial+30*known", "30*l1+adversarial+8*features", "mse+dssim"])
def test_a_step_minimises_what_the_loss_says_and_reports_its_terms(loss, monkeypatch):
    image, mask, looks = small_batch()
    run = fresh("gan", "--act", "swish", loss=loss)
    before = [value.clone() for value in run.generator.parameters()]
    updates = spied(monkeypatch, inpaint, "update")
    output = run.generator(data.damage(image, mask), mask)
    weights = losses.parse_loss(loss)
    report = inpaint.training_step(run, image, mask, looks)
    expected = sum(times * report[term].item() for term, times in weights.items())
    assert updates[-1][1].item() == pytest.approx(expected)
    for term, value in losses.distances(weights, output, image, mask, 10).items():
        assert report[term] == pytest.approx(value.item(), rel=1e-4)
    judged = {"adversarial", "d_loss", "D(real)", "D(fake)"} if "adversarial" in weights else set()
    assert set(report) == set(weights) | judged
    assert len(updates) == (2 if judged else 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, run.generator.parameters())), "all are trained"


@pytest.mark.parametrize("augment", ["none", "color+shift"])
@pytest.mark.parametrize("judge", ["middle", "restored", "output"])
def test_the_discriminator_is_shown_originals_and_fakes_changed_anew_at_each_look(judge, augment):
    image, mask, _ = small_batch()
    run = fresh("gan", judge=judge, augment=augment)
    shown, painted = [], []
    looks = torch.rand(8, 3, 5, generator=torch.Generator().manual_seed(0))
    run.generator.register_forward_hook(lambda network, given, output: painted.append(output))
    run.discriminator.register_forward_pre_hook(lambda network, given: shown.append(given[0]))
    inpaint.training_step(run, image, mask, looks)
    fake = painted[0] if judge == "output" else data.paste(painted[0], image, mask)
    # Its own step, then the generator's: there both are changed alike, so that their features compare.
    for seen, picture, look in zip(shown, (image, fake, fake, image), (0, 1, 2, 2), strict=True):
        if judge == "middle":
            picture = picture[:, :, 8:24, 8:24]
        if augment == "color+shift":
            picture = models.augment(picture, looks[:, look])
        assert torch.equal(seen, picture)
    assert [z.requires_grad for z in shown] == [False, False, True, False], "its own step moves no generator"


def test_features_are_the_distance_of_what_the_discriminator_finds_and_teach_the_generator_alone(monkeypatch):
    image, mask, looks = small_batch()
    run = fresh("gan")
    compared = spied(monkeypatch, losses, "feature_loss")
    report = inpaint.training_step(run, image, mask, looks)
    ((fakes, reals),) = compared
    assert [len(fakes), len(reals)] == [2, 2], "a feature for each level"
    assert all(fake.requires_grad and not real.requires_grad for fake, real in zip(fakes, reals))
    fakes, reals = ([feature.detach().double().numpy() for feature in found] for found in compared[0])
    expected = sum(np.abs(fake - real).mean() for fake, real in zip(fakes, reals))
    assert report["features"].item() == pytest.approx(expected, rel=1e-5)
    fake = data.paste(run.generator(data.damage(image, mask), mask), image, mask)
    loss = inpaint.ask_discriminator(run, image, fake, looks[:, 2])["features"]
    taught, judging = (list(network.parameters()) for network in run.networks.values())
    found = torch.autograd.grad(loss, [*taught, *judging], allow_unused=True)
    assert all(gradient.abs().sum() > 0 for gradient in found[: len(taught)])
    assert set(found[len(taught) :]) == {None}


def test_the_adversarial_loss_moves_the_generator_and_not_the_discriminator_that_judges(monkeypatch):
    run = fresh("gan")
    update = inpaint.update
    states = []
    judged = spied(monkeypatch, losses, "discriminator_loss")

    def spy(optimizer, loss):
        update(optimizer, loss)
        states.append([(weight.clone(), weight.grad.clone()) for weight in run.discriminator.parameters()])

    start = [weight.clone() for weight in run.discriminator.parameters()]
    monkeypatch.setattr(inpaint, "update", spy)
    inpaint.training_step(run, *small_batch())
    first, second = states
    assert not any(torch.equal(a, b) for a, (b, _) in zip(start, first)), "first the discriminator's step"
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "then it holds still"
    assert all(weight.grad.abs().sum() > 0 for weight in run.generator.parameters())
    assert all(weight.requires_grad for weight in run.discriminator.parameters())
    assert judged[0][2] == 0.1, "real pictures are to be judged nine tenths real"


def test_the_model_decides_how_weights_start_and_decay_and_the_loss_does_not():
    gan = fresh("gan")
    l1 = fresh("gan", "--loss", "l1")
    unet = fresh()
    assert same_weights(gan.generator, l1.generator)
    assert same_weights(gan.discriminator, fresh("gan").discriminator), "they follow from the seed"
    for other in (fresh(limit=16), fresh("gan", seed=1)):
        assert not torch.equal(gan.generator.paint.weight, other.generator.paint.weight)
    for run, decay, count in ((gan, 0, 2), (l1, 0, 1), (unet, 0.05, 1)):
        groups = [optimizer.param_groups[0] for optimizer in run.optimizers.values()]
        assert len(groups) == count
        for group in groups:
            assert group["weight_decay"] == decay
            assert group["betas"] == (0.5, 0.999)
        assert same_weights(run.ema, run.generator)
        assert torch.equal(run.generator.keep.weight[:, :3, 0, 0], 5 * torch.eye(3)), "it starts by keeping"


@pytest.mark.parametrize("step, decay", [(0, 0.1), (90, 0.91), (10**6, 0.999)])
def test_each_step_moves_the_average_of_weights_and_batch_norm_by_its_formula_to_the_bit(step, decay):
    run = fresh()
    run.step = step
    before = {name: value.clone() for name, value in run.ema.state_dict().items()}
    inpaint.training_step(run, *small_batch())
    weights = run.generator.state_dict()
    after = run.ema.state_dict()
    for name in weights:
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after[name], before[name].lerp(weights[name], 1 - decay)), name
            plain = decay * before[name].double() + (1 - decay) * weights[name].double()
            assert (after[name] - plain).abs().max() < 1e-6
    assert not torch.equal(after["down.1.1.running_mean"], before["down.1.1.running_mean"])


# === inpaint.py: an epoch =========================================================================


def test_an_epoch_mirrors_half_of_its_pictures_and_is_shared_without_overlap(monkeypatch):
    assert 0.4 < inpaint.draw_epoch(options_for(), 0, 1000, 1000)[1].float().mean() < 0.6
    orders, others = [[], []], []
    options = options_for("unet", "--wild")
    for epoch, rank in itertools.product((0, 1), range(3)):
        monkeypatch.setattr(inpaint, "rank_and_world", lambda rank=rank: (rank, 3))
        order, flip, looks, boxes, framing = inpaint.draw_epoch(options, epoch, 30, 10)
        orders[epoch] += order.tolist()
        others.append([*flip.tolist(), *boxes.flatten().tolist(), *looks.flatten().tolist()])
        assert framing.shape == (10, 5)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(30))
    assert orders[0] != orders[1]
    assert len({tuple(each) for each in others}) == 6, "each process and epoch has chances of its own"
    assert not inpaint.draw_epoch(options_for(), 0, 30, 10)[3].numel(), "without --wild there is one hole"


def test_a_network_for_photos_is_trained_on_framed_pictures_with_other_holes(monkeypatch):
    seen, pixels = [], data.synthetic_faces(16, 32)
    monkeypatch.setattr(inpaint, "training_step", lambda run, *batch: seen.append(batch[:2]) or {})
    run = fresh("unet", "--wild")
    inpaint.train_epoch(run, pixels)
    order, flip, _, boxes, framing = inpaint.draw_epoch(run.options, 0, 16, 16)
    images = torch.cat(list(data.batches(pixels, 8, order, flip, CPU)))
    assert torch.equal(torch.cat([image for image, _ in seen]), data.frame(images, framing))
    assert torch.equal(torch.cat([mask for _, mask in seen]), data.box_mask(boxes, 32))


def test_the_learning_rate_rises_over_the_first_tenth_then_falls_to_zero(monkeypatch):
    rates = [inpaint.learning_rate(0.5, step, 100) for step in range(101)]
    assert np.allclose(np.diff(rates[:10]), 0.05)
    assert max(rates) == rates[9] == rates[10] == 0.5
    assert np.allclose(np.diff(rates[10:]), -0.5 / 90)
    assert rates[100] == 0
    rates = [inpaint.learning_rate(1, step, total) for total in range(1, 40) for step in range(total)]
    assert 0 < min(rates)
    assert max(rates) <= 1, "in a run of any length --lr is the highest"
    used, run = [], fresh("gan", lr=0.25, epochs=2)

    def spy(run, *_):
        used.append([optimizer.param_groups[0]["lr"] for optimizer in run.optimizers.values()])
        return {}

    monkeypatch.setattr(inpaint, "training_step", spy)
    for run.epoch in (0, 1):
        inpaint.train_epoch(run, data.synthetic_faces(80, 32))
    expected = [[inpaint.learning_rate(highest, step, 20) for highest in (0.25, 2e-4)] for step in range(20)]
    assert np.allclose(used, expected, rtol=1e-12), "the generator at --lr, the discriminator at 2e-4"


@pytest.mark.parametrize("what, when", [("l1", 6), ("a weight (", 8)])  # in the second epoch; at its very end
def test_a_number_that_is_not_finite_stops_the_run_and_keeps_the_last_epoch(what, when, monkeypatch, capsys):
    step, count = inpaint.training_step, itertools.count(1)

    def poisoned(run, *given):
        report = step(run, *given)
        if next(count) == when:
            torch.nn.init.constant_(run.generator.paint.weight, math.nan)
        return report

    monkeypatch.setattr(inpaint, "training_step", poisoned)
    assert command("--epochs", 3, "--out", "run", *TINY) == 2
    told = capsys.readouterr().err
    assert what in told
    assert "is nan in epoch 2" in told
    assert "the last epoch is kept" in told
    state = last_state("run")
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["generator"].values())


def test_bfloat16_trains_and_its_losses_and_metrics_are_float32(monkeypatch):
    convolved = set()
    measured = spied(monkeypatch, losses, "measure")
    trained = spied(monkeypatch, losses, "distances")

    def look(layer, _, output):
        if isinstance(layer, torch.nn.Conv2d):
            convolved.add(output.dtype)

    words = ["--model", "gan", "--loss", "30*l1+dssim+adversarial+features", "--precision", "bfloat16"]
    with torch.nn.modules.module.register_module_forward_hook(look):
        assert command(*words, "--epochs", 1, "--out", "run", *TINY) == 0
    assert convolved == {torch.bfloat16}
    assert {given[0].dtype for given in measured} == {given[1].dtype for given in trained} == {torch.float32}
    assert math.isfinite(results("run")["psnr_hole"])


# === inpaint.py: validation =======================================================================


def test_validation_is_the_mean_over_pictures_and_swd_that_of_the_first_eight_parts(faces, monkeypatch):
    split = torch.Tensor.split  # into nine parts, of 2 pictures instead of 100, of which the last is smaller
    monkeypatch.setattr(torch.Tensor, "split", lambda pixels, count: split(pixels, count // 50))
    pixels = (faces[:17] * 255).round().byte()
    image = pixels.float() / 255
    first, second = (inpaint.validate(lambda damaged: damaged.roll(20, 3), pixels, HOLE) for _ in range(2))
    assert first == second, "to the bit"
    assert set(first) == {*inpaint.METRICS, "pictures"}
    assert first["pictures"] == 17
    output = data.damage(image, HOLE).roll(20, 3)
    restored = data.paste(output, image, HOLE)
    means = losses.measure(output, restored, image, HOLE).mean(1).tolist()
    assert [first[name] for name in losses.PER_PICTURE] == pytest.approx(means, abs=1e-4)
    assert first["swd_hole"] == pytest.approx(losses.swd(restored[:16], image[:16], HOLE))


def test_what_is_painted_does_not_depend_on_the_other_pictures_of_a_batch():
    (image, mask, _), network, exact = small_batch(), fresh().ema, {"precision": "float32"}
    for weight in network.parameters():
        weight.normal_(0, 0.3)
    first, again, alone = (inpaint.run_ema(network, z, mask[:1], exact) for z in (image, image, image[:1]))
    assert torch.equal(first, again)
    assert torch.allclose(first[:1], alone, atol=1e-5), "not evaluation mode"


def test_told_is_half_for_originals_nearly_1_for_grey_the_same_each_time_and_nothing_for_few(capsys):
    pixels, mask = data.synthetic_faces(240, 32), data.center_hole(32, 0.3)
    before = torch.get_rng_state()
    by_heart = functools.partial(models.nearest_face, mask=mask, training=pixels)
    assert inpaint.tell(by_heart, pixels, mask) == 0.5
    assert inpaint.tell(functools.partial(torch.full_like, fill_value=0.5), pixels, mask) > 0.9
    assert torch.equal(torch.get_rng_state(), before)
    smooth = functools.partial(models.harmonic, mask=mask)
    first = inpaint.tell(smooth, pixels, mask)
    assert 0.6 < first < 0.9, "where chance would show"
    torch.manual_seed(123)
    assert inpaint.tell(smooth, pixels, mask) == first
    assert not complaints(capsys.readouterr().err)
    assert inpaint.tell(smooth, pixels[:199], mask) is None
    assert "told is left out: 199 pictures are too few, it takes 200\n" in capsys.readouterr().err


def test_told_stands_in_the_results_of_a_finished_run_its_evaluation_and_the_table(monkeypatch, capsys):
    monkeypatch.setattr(data, "SYNTHETIC", 240)
    monkeypatch.setattr(inpaint, "ROWS", inpaint.ROWS[:1])
    words = ["--val", 0.9, "--epochs", 2, "--precision", "float32"]
    told = spied(monkeypatch, inpaint, "tell")
    assert command("--compare", *words, *TINY[:4], "--device", "cpu", "--out", "cmp") == 0
    assert len(told) == 1 + len(METHODS), "the last epoch alone"
    run = Path("cmp/U-Net-l1-relu-seed-0")
    capsys.readouterr()
    assert command("--evaluate", run / "generator.pt", "--device", "cpu") == 0
    share = json.loads(capsys.readouterr().out)["told"]
    assert command("--resume", run, "--device", "cpu") == 0, "a finished run keeps it"
    assert 0.3 < share == results(run)["told"] == last_state(run)["told"]
    cells = [row["told"] for row in read_csv("cmp/table.csv")]
    assert cells[0] == f"{share:.3f}"
    assert float(cells[1]) > 0.7, "a white hole"


# === inpaint.py: a run and its folder =============================================================

FILES = {"last.pt", "generator.pt", "results.json", "log.csv", "curves.png", "grid.png", "training.gif"}
SHOWN = ("results.json", "log.csv", "curves.png", "grid.png", "training.gif")


def test_a_run_folder_holds_all_that_is_promised(tiny_run):
    assert {file.name for file in tiny_run.iterdir()} == FILES
    rows = read_csv(tiny_run / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[-1]["step"] == "8"
    assert {"seconds", "images_per_second", "l1", *inpaint.METRICS} <= set(rows[0])
    found = results(tiny_run)
    assert {name: found[name] for name in ("epoch", "pictures")} == {"epoch": 2, "pictures": 8}
    assert {name: str(found[name]) for name in inpaint.METRICS} == {n: rows[-1][n] for n in inpaint.METRICS}
    assert found["options"]["res"] == 32
    assert found["parameters"]["generator"] > 1000
    assert found["versions"]["torch"] == torch.__version__
    with Image.open(tiny_run / "training.gif") as film:
        assert film.n_frames == 3, "the damaged faces and two epochs"


def test_curves_png_shows_the_loss_and_two_metrics_each_below_its_title(tiny_run, monkeypatch):
    charts = spied(monkeypatch, data, "chart")
    sheets = spied(monkeypatch, data, "beside")
    shutil.copytree(tiny_run, "run")
    assert command("--resume", "run", "--device", "cpu") == 0
    log = read_csv("run/log.csv")
    panels = {"loss": "l1", "PSNR in the hole (dB)": "psnr_hole"}
    panels["PSNR of the whole output (dB)"] = "psnr_output"
    ((titles,),) = sheets
    assert list(titles) == list(panels)
    for (below, curves), name in zip(charts, panels.values(), strict=True):
        assert below == "epoch"
        assert curves == {name: [(int(row["epoch"]), float(row[name])) for row in log]}


def test_until_its_first_epoch_ends_a_run_holds_what_a_resume_needs_and_shows_nothing(monkeypatch):
    stopped(monkeypatch, 2)
    assert command("--epochs", 2, "--out", "run", *TINY) == 130
    assert {file.name for file in Path("run").iterdir()} == {"last.pt", "generator.pt"}


@pytest.mark.parametrize("res", [32, 256])
def test_a_run_really_trains_at_its_resolution_in_a_folder_of_its_name(res, monkeypatch):
    steps = spied(monkeypatch, inpaint, "training_step")
    monkeypatch.setattr(data, "SYNTHETIC", 10)
    for _ in range(2):
        assert command("--model", "gan", "--epochs", 1, *TINY, "--res", res) == 0
    shapes = {(image.shape, mask.shape) for _, image, mask, _ in steps}
    assert shapes == {((8, 3, res, res), (1, 1, res, res))}
    name = f"gan-200xl1+adversarial+24xfeatures-relu-{res}"
    assert {file.parent.name for file in Path("runs").glob("*/results.json")} == {name, f"{name}-2"}


def test_the_same_command_and_seed_gives_the_same_bytes():
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert command("--model", "gan", "--epochs", 1, "--seed", seed, "--out", name, *TINY) == 0
    for file in ("results.json", "grid.png", "training.gif", "generator.pt"):
        assert Path("a", file).read_bytes() == Path("b", file).read_bytes(), file
        assert Path("a", file).read_bytes() != Path("c", file).read_bytes(), file


def assert_same_run(one, two):
    """Two runs ended alike, bit for bit, but for their times."""
    for file in ("grid.png", "training.gif"):
        assert Path(one, file).read_bytes() == Path(two, file).read_bytes(), file
    logs = [read_csv(Path(folder, "log.csv")) for folder in (one, two)]
    for row in sum(logs, []):
        del row["seconds"], row["images_per_second"]
    assert logs[0] == logs[1]
    first, second = map(last_state, (one, two))
    for part in {"generator", "ema", "discriminator"} & set(first):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items()), part


@pytest.mark.parametrize("recipe", ["--model gan", "--model unet --act swish --wild"])
def test_a_run_stopped_and_resumed_ends_bit_for_bit_like_one_that_was_not(recipe, monkeypatch, capsys):
    words = [*recipe.split(), "--epochs", 3, *TINY]
    assert command(*words, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stopped(patch, 10)  # in the third epoch
        assert command(*words, "--out", "half done") == 130
    assert "python inpaint.py --resume 'half done'" in capsys.readouterr().err
    assert command("--resume", "half done", "--device", "cpu") == 0
    assert_same_run("whole", "half done")


@pytest.mark.parametrize("model, kills", [("unet", 1), pytest.param("gan", 20, marks=slow)])
def test_a_run_killed_at_random_moments_goes_on_each_time(model, kills):
    write_photos("photos", *((40, 40) if kills == 1 else (150, 200)), ".png")
    words = ["--data", "photos", "--model", model, "--epochs", 3 if kills == 1 else 25, *TINY]
    assert command(*words, "--out", "whole") == 0
    shutil.rmtree("cache")
    chances, last = random.Random(0), Path("run/last.pt")

    def go_on():
        return ["--resume", "run", "--device", "cpu"] if last.exists() else [*words, "--out", "run"]

    for _ in range(kills):
        process = started('exec "$@"', *go_on())
        while kills == 1 and not last.exists() and process.poll() is None:
            time.sleep(0.01)  # a single kill should meet a run in its midst
        time.sleep(chances.uniform(0, 0.2 if kills == 1 else 7))  # from importing to the middle of a run
        process.kill()
        process.communicate()
        assert not last.exists() or inpaint.read_checkpoint(last)
    assert command(*go_on()) == 0
    assert_same_run("run", "whole")


def test_more_epochs_are_not_forgotten_if_stopped_at_once_the_film_goes_on_and_the_rate_is_told(
    tiny_run, monkeypatch, capsys
):
    shutil.copytree(tiny_run, "run")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        stopped(patch, 0)
        assert command("--resume", "run", "--epochs", 3, "--depth", 3, "--device", "cpu") == 130
    rate = 3e-3 * (3 - 2) / (0.9 * 3)
    line = f"run: with more epochs, the learning rate is {rate:.2g} again; it had nearly reached 0"
    assert line in capsys.readouterr().err.splitlines()
    assert results("run")["options"]["epochs"] == 3
    assert command("--resume", "run", "--device", "cpu") == 0
    assert not complaints(capsys.readouterr().err), "no more epochs than before"
    assert [row["epoch"] for row in read_csv("run/log.csv")] == ["1", "2", "3"]
    assert Image.open("run/training.gif").n_frames == 4


def test_the_film_of_a_long_run_has_60_epochs_evenly_and_the_last_one_always(faces):
    run = SimpleNamespace(options={"epochs": 600, "res": 64}, film={})
    for run.epoch in range(1, 596):
        inpaint.keep_in_film(run, faces[run.epoch % 20 :][:3])
        assert run.epoch in run.film
    assert list(run.film) == [*range(10, 600, 10), 595]
    assert torch.equal(run.film[30], (faces[10:13] * 255).round().byte())
    run.options["epochs"] = 12
    for run.epoch in (1, 2, 2):
        inpaint.keep_in_film(run, faces[:3])
    assert list(run.film) == [1, 2], "again from the start, and no epoch twice"


def test_a_run_goes_on_wherever_it_and_its_pictures_are_moved(tmp_path, capsys):
    write_photos("in", 12, 40)
    more = ["--epochs", 2, "--device", "cpu"]
    assert command("--data", "in", "--epochs", 1, "--out", "run", *TINY) == 0
    Path("in").rename("moved")
    Path("run").rename("carried")
    assert command("--resume", "carried", *more) == 2
    assert "in does not exist: give the place where it is" in capsys.readouterr().err
    assert command("--resume", "carried", "--data", "moved", *more) == 0
    assert last_state("carried")["options"]["data"] == str(tmp_path / "moved")
    assert len(read_csv("carried/log.csv")) == 2


def test_the_precision_is_stored_as_chosen_and_a_resume_keeps_it(monkeypatch):
    used = spied(monkeypatch, inpaint, "autocast")
    monkeypatch.setattr(inpaint, "choose_precision", lambda wanted, device: "float32")
    with monkeypatch.context() as patch:
        stopped(patch, 5)
        assert command("--epochs", 2, "--out", "run", *TINY) == 130
    elsewhere = {"auto": "bfloat16"}  # another processor
    monkeypatch.setattr(inpaint, "choose_precision", lambda wanted, _: elsewhere.get(wanted, wanted))
    assert command("--resume", "run", "--device", "cpu") == 0
    assert {precision for _, precision in used} == {"float32"}
    assert last_state("run")["options"]["precision"] == "float32"


def test_a_full_disk_stops_the_run_with_a_line_and_keeps_the_previous_checkpoint(monkeypatch, capsys):
    whole_file, count = data.whole_file, itertools.count()

    def full(path):
        if path.name == "last.pt" and next(count) == 2:
            monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
        return whole_file(path)

    monkeypatch.setattr(data, "whole_file", full)
    assert command("--epochs", 3, "--out", "run", *TINY) == 2
    (line,) = complaints(capsys.readouterr().err)
    assert "No space left" in line
    assert "what was saved before is intact" in line
    assert last_state("run")["epoch"] == 1
    assert not list(Path("run").glob(".*"))


@pytest.mark.parametrize("how, warned", [("once", 5), ("always", 13)])
def test_files_that_only_show_the_run_never_end_it_and_a_resume_writes_them(how, warned, monkeypatch, capsys):
    save, refused = data.save, []

    def save_or_refuse(path, content):
        if Path(path).name in SHOWN and (how == "always" or path not in refused):
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(data, "save", save_or_refuse)
        assert command("--epochs", 3, "--out", "run", *TINY) == 0
    told = complaints(capsys.readouterr().err)
    assert len(refused) == len(told) == warned
    for path, line in zip(refused, told):
        assert f"warning: {path} cannot be written (Permission denied)" in line
    assert last_state("run")["epoch"] == len(last_state("run")["log"]) == 3
    missing = SHOWN if how == "always" else {"training.gif"}
    assert {file.name for file in Path("run").iterdir()} == FILES - set(missing)
    assert command("--resume", "run", "--device", "cpu") == 0
    assert {file.name for file in Path("run").iterdir()} == FILES
    assert len(read_csv("run/log.csv")) == 3


RARE_SCREENS = [pytest.param(screen, marks=slow) for screen in ("| head -1", ">&-", "2>&-", "2> /dev/full")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("screen", ["> /dev/full", *RARE_SCREENS])
def test_a_screen_that_takes_no_line_ends_no_training(screen):
    process = started(f'"$@" {screen}', "--epochs", 2, "--out", "run", *TINY)
    _, complaint = process.communicate()
    assert process.returncode == 0, complaint
    assert not complaints(complaint)
    assert last_state("run")["epoch"] == 2


@needs_celeba
def test_a_network_that_learnt_400_real_faces_paints_others_better_than_smooth_filling():
    pixels = data.load_images(os.environ["CELEBA"], 64)[:500]
    options = options_for("unet", *"--act swish --res 64 --width 24 --depth 5 --batch 8 --epochs 4".split())
    run, mask = inpaint.Run(options, CPU), data.center_hole(64, 0.3)
    for run.epoch in range(4):
        inpaint.train_epoch(run, pixels[:400])
    painters = [lambda z: models.harmonic(z, mask), lambda z: inpaint.run_ema(run.ema, z, mask, options)]
    smooth, network = (inpaint.validate(painter, pixels[400:], mask)["psnr_hole"] for painter in painters)
    assert network > smooth + 1


# === inpaint.py: several processes ================================================================


def gradients(run, *batch):
    """Those of all networks in a step that moves no weight."""
    for optimizer in run.optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
    inpaint.training_step(run, *batch)
    return [weight.grad.clone() for network in run.networks.values() for weight in network.parameters()]


def two_processes(rank, folder, model):
    """One of two gloo processes: steps on its half, a small run, its resume. What was seen is kept."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    seen, run = {}, fresh(model)
    inpaint.share_gradients(run)
    batch = [part[8 * rank : 8 * rank + 8] for part in small_batch(16)]
    seen["gradients"] = gradients(run, *batch)
    for optimizer in run.optimizers.values():
        optimizer.param_groups[0]["lr"] = 1e-3
    for _ in range(3):
        inpaint.training_step(run, *batch)
    inpaint.average_buffers(run)
    seen["states"] = [network.state_dict() for network in (*run.networks.values(), run.ema)]
    write_photos("photos", 40, 40) if rank == 0 else None
    dist.barrier()
    options = options_for(model, epochs=1, data=f"{folder}/photos")
    inpaint.train_command(options, None, "run", CPU)
    inpaint.train_command(options | {"epochs": 2}, Path("run"), None, CPU)
    torch.save(seen, f"{folder}/{rank}.pt")
    inpaint.leave_processes()


@pytest.mark.parametrize("model", ["gan", pytest.param("unet", marks=slow)])
def test_two_processes_average_their_gradients_stay_equal_and_tell_things_once(model, tmp_path, capfd):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path), model), nprocs=2)
    assert capfd.readouterr().err.count("with more epochs") == 1
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    halves = zip(*(part.split(8) for part in small_batch(16)))
    halves = [gradients(fresh(model), *half) for half in halves]
    for found, again, one, two in zip(first["gradients"], second["gradients"], *halves, strict=True):
        assert torch.equal(found, again)
        assert torch.allclose(found, (one + two) / 2, atol=1e-5, rtol=1e-3)
    for one, two in zip(first["states"], second["states"], strict=True):
        assert all(torch.equal(value, two[name]) for name, value in one.items()), "batch norm too"
    assert results("run")["processes"] == 2
    assert len(read_csv("run/log.csv")) == 2
    assert command("--resume", "run", "--epochs", 3, "--device", "cpu") == 2, "it takes two again"


@slow
def test_torchrun_trains_resumes_and_refuses_in_one_line():
    write_photos("photos", 40, 40)
    write_photos("broken", 40, 40)
    for i in range(5):
        Path(f"broken/{i:03d}.jpg").write_bytes(b"")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(HERE / "inpaint.py")]
    how = {"check": False, "capture_output": True, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    train = ["--data", "photos", "--model", "gan", "--epochs", "1", "--out", "run", *TINY]
    for words in (train, ["--resume", "run", "--epochs", "2", "--device", "cpu"]):
        done = subprocess.run([*torchrun, *words], **how)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("pictures to train on") == 1
    assert len(read_csv("run/log.csv")) == 2
    for words, mistake in (
        (train, "--out run already holds files"),
        (["--epochs", "0"], "--epochs 0 will not do"),
        (["--data", "broken", *train[2:-2], "--out", "x"], "5 of 40 pictures are broken"),
    ):
        told = subprocess.run([*torchrun, *words], **how).stderr
        assert told.count(f"inpaint.py: {mistake}") + told.count(f"broken: {mistake}") == 1, told
        assert 'inpaint.py", line' not in told
        # torchrun stops the other process (-15) if it finds it still on its way out when the first has ended.
        assert set(re.findall(r"exitcode  : (-?\d+)", told)) - {"-15"} == {"2"}


def test_without_torch_distributed_all_jobs_run(tiny_run, monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    for name in ("is_initialized", "is_torchelastic_launched", "get_rank", "barrier"):
        monkeypatch.delattr(dist, name)
    write_photos("in", 1, 40)
    assert command("--epochs", 1, "--out", "run", *TINY) == 0
    assert command("--resume", "run", "--epochs", 2, "--device", "cpu") == 0
    assert command("--evaluate", "run/generator.pt", "--device", "cpu") == 0
    assert command("--restore", "in", "--checkpoint", "run/generator.pt", "--device", "cpu") == 0


# === inpaint.py: evaluating and comparing =========================================================


def test_evaluate_prints_the_metrics_of_the_run_as_json_and_nothing_else(tiny_run, capsys):
    assert command("--evaluate", tiny_run / "generator.pt", "--device", "cpu") == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {*inpaint.METRICS, "pictures", "told"}
    assert printed.pop("told") is None, "of so few pictures"
    assert printed.items() <= results(tiny_run).items()
    words = ["--val", 1, "--res", 64, "--device", "cpu"]
    assert command("--evaluate", tiny_run / "generator.pt", *words) == 0
    assert json.loads(capsys.readouterr().out)["pictures"] == 40, "--val 1 measures all pictures"
    assert not any(Path().iterdir()), "and writes nothing"


def test_a_gan_is_evaluated_with_a_larger_hole_than_its_discriminator_could_judge(tiny_run, capsys):
    state = torch.load(tiny_run / "generator.pt", weights_only=True)
    gan = {"model": "gan", "loss": inpaint.RECIPES["gan"]["loss"]}
    torch.save(state | {"options": state["options"] | gan}, "generator.pt")
    assert command("--evaluate", "generator.pt", "--hole", 0.5, "--device", "cpu") == 0
    assert json.loads(capsys.readouterr().out)["psnr_hole"] < results(tiny_run)["psnr_hole"]


COMPARE = ["--compare", "--epochs", 1, "--width", 4, "--res", 32, "--device", "cpu"]
METHODS = ["white hole", "smooth filling", "mean face", "nearest face"]


@pytest.fixture
def few_rows(monkeypatch):
    """A U-Net, the paper's GAN and ours, so that a comparison is quick."""
    monkeypatch.setattr(inpaint, "ROWS", [inpaint.ROWS[k] for k in (0, 4, 8)])


def test_compare_fills_the_table_and_goes_on_where_it_was_stopped(few_rows, monkeypatch, capsys):
    drawn = spied(monkeypatch, data, "synthetic_faces")
    with monkeypatch.context() as patch:
        stopped(patch, 7)  # of rows of 4, 1 (the paper's batches are of 64, or all) and 4 steps: in the third
        assert command(*COMPARE, "--out", "cmp") == 130
    assert "with the same command" in capsys.readouterr().err
    names = ["U-Net", "the paper's GAN", "our GAN"]
    assert [row["network"] for row in read_csv("cmp/table.csv")] == names[:2]
    finished = {}
    for file in Path("cmp").glob("*/training.gif"):
        finished |= contents(file.parent)
    assert len(finished) == 2 * len(FILES)
    steps = spied(monkeypatch, inpaint, "training_step")
    assert command(*COMPARE, "--out", "cmp") == 0
    assert len(steps) == 4, "finished rows are not trained again"
    assert finished.items() <= contents("cmp").items(), "nor written to"
    table = read_csv("cmp/table.csv")
    assert [row["network"] for row in table] == [*names, *METHODS]
    assert all(float(row["psnr_hole"]) > 0 for row in table)
    assert [row["paper"] for row in table] == ["6.178", "6.153", "", "", "", "", ""]
    text = Path("cmp/table.md").read_text()
    assert text.count("\n| ") == 1 + len(table)
    assert all(Image.open(f"cmp/{name}.png").width > 400 for name in ("comparison", "tradeoff"))
    assert len(drawn) == 2, "the data is loaded once a command, not once a row"
    assert command(*COMPARE[:2], 2, *COMPARE[3:], "--res", 64, "--out", "cmp") == 2
    assert "--res 64 contradicts --res 32" in capsys.readouterr().err


def test_the_rows_of_the_table_are_the_papers_six_and_five_more():
    names = [(name, row.get("loss", ""), row["act"]) for name, row, _ in inpaint.ROWS]
    assert len(set(names)) == 11, "each has a folder of its own"
    assert [paper for *_, paper in inpaint.ROWS[:6]] == ["6.178", "6.093", "6.178", "6.065", "6.153", "6.069"]
    for _, row, _ in inpaint.ROWS[4:6]:
        assert (row["augment"], row["judge"], row["batch"], row["lr"]) == ("none", "output", 64, 2e-4)


def test_compare_trains_k_times_for_a_mean_and_deviation_and_tradeoff_has_psnr_across_and_swd_up(monkeypatch):
    monkeypatch.setattr(inpaint, "ROWS", inpaint.ROWS[:1])
    charts = spied(monkeypatch, data, "chart")
    assert command(*COMPARE, "--seeds", 2) == 0
    runs = [results(file.parent) for file in Path("runs/compare").glob("*/results.json")]
    psnrs, swds = ([run[metric] for run in runs] for metric in ("psnr_hole", "swd_hole"))
    assert len(runs) == 2
    expected = f"{np.mean(psnrs):.2f} ± {np.std(psnrs, ddof=1):.2f}"
    assert read_csv("runs/compare/table.csv")[0]["psnr_hole"] == expected
    below, points = charts[-1][:2]
    assert re.match("across: psnr_hole .*; up: swd_hole", below)
    assert points == {"U-Net, l1, relu": [pytest.approx((np.mean(psnrs), np.mean(swds)))]}, "what was trained"


# === inpaint.py: restoring your own photo =========================================================


def restore(run, *words):
    """--restore with the network of a run -> exit code."""
    return command("--restore", *words, "--checkpoint", run / "generator.pt", "--device", "cpu")


def pixels_of(path):
    """A picture file as the program reads it: uint8 (H, W, 3)."""
    return np.asarray(data.open_photo(Path(path).read_bytes()))


def drawn(*size, seed=9):
    """A drawn face as a picture of any size."""
    return data.to_picture(data.synthetic_faces(1, 128, seed)[0]).resize(size)


SIZES = [(1, 1), (97, 201), (333, 100), (1300, 801), pytest.param((5000, 3000), marks=slow)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_photo_of_any_size_is_restored_upright_and_its_known_pixels_are_the_same_bits(size, tiny_run):
    face = drawn(*size)
    face.putalpha(Image.linear_gradient("L").resize(size))  # what is transparent becomes white
    exif = Image.Exif()
    exif[0x0112] = 8  # lying on its side
    face.save("p.png", exif=exif)
    before = pixels_of("p.png")
    assert restore(tiny_run, "p.png") == 0
    after = pixels_of("restored/p-restored.png")
    assert after.shape == before.shape == (size[0], size[1], 3)
    square = min(size)
    top, left = ((length - square) // 2 + round(square * 11 / 32) for length in size)
    side = max(1, round(square * 10 / 32))  # 0.3 of 32 pixels are 10, from pixel 11 on
    known = np.ones(size, bool)
    known[top : top + side, left : left + side] = False
    assert (after[known] == before[known]).all()
    assert (after[~known] != before[~known]).any()
    assert Path("restored/p-compare.png").exists()


def holes():
    """Holes of a photo of 200 x 300, bool (300, 200): four boxes, one of two parts, a round one."""
    y, x = np.mgrid[:300, :200]
    boxes = (60, 90, 130, 170), (0, 0, 50, 60), (150, 200, 200, 300), (20, 140, 190, 160)
    found = [(x >= a) & (x < c) & (y >= b) & (y < d) for a, b, c, d in boxes]
    return [*found, found[1] | found[2], (x - 100) ** 2 + (y - 150) ** 2 < 40**2]


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_says_what_is_missing_wherever_it_is_and_the_join_leaves_no_seam(scale, tiny_run, monkeypatch):
    painted = (0.3 + 0.2 * torch.linspace(0, 12, 32).sin()).expand(1, 3, 32, 32)  # waves, of other colours
    monkeypatch.setattr(inpaint, "run_ema", lambda *_: painted.clone())
    y, x = np.mgrid[:300, :200]
    before = (200 - x / 2 - y / 4).astype(np.uint8)[..., None].repeat(3, 2)
    before[..., 0] //= 2
    Image.fromarray(before).save("me.png")
    for number, hole in enumerate(holes(), 1):
        Image.fromarray(hole[::scale, ::scale]).save("m.png")  # a mask may be smaller than its photo
        hole = hole[::scale, ::scale].repeat(scale, 0).repeat(scale, 1)
        assert restore(tiny_run, "me.png", "--mask", "m.png", "--out", number) == 0
        after = pixels_of(f"{number}/me-restored.png")
        changed = np.abs(after.astype(float) - before).max(2)
        assert (changed[~hole] == 0).all()
        assert changed[hole].any()
        beside = F.max_pool2d(torch.from_numpy(~hole)[None].float(), 3, 1, 1)[0].numpy() > 0
        assert changed[hole & beside].mean() < 2, "the first pixels inside continue the last ones outside"


@pytest.fixture
def shown(monkeypatch):
    """All that is handed to the network: a list of (network, damaged, hole, options)."""
    return spied(monkeypatch, inpaint, "run_ema")


def network(*words):
    """(an untrained network of 64 pixels, its options)."""
    options = options_for("unet", "--res", "64", *words)
    return inpaint.build_generator(options).eval(), options


def test_a_photo_of_the_networks_size_is_shown_and_painted_as_by_evaluate_to_the_byte(shown, monkeypatch):
    ema, options = network()
    hole = data.center_hole(64, 0.3)
    pixels = data.synthetic_faces(1, 64)
    image = pixels.float() / 255
    inpaint.validate(lambda damaged: inpaint.run_ema(ema, damaged, hole, options), pixels, hole)
    monkeypatch.setattr(models, "harmonic", lambda z, mask: z * (1 - mask))  # no join
    restored = inpaint.fill(ema, options, image[0], inpaint.central_mask(drawn(64, 64), options))
    (_, evaluated, *_), (_, ours, mask, _) = shown
    assert torch.equal(mask, hole)
    assert hole.nonzero()[:, 2:].aminmax() == (22, 40)
    assert (evaluated - ours).abs().max() < 1e-6
    painted = inpaint.run_ema(ema, evaluated, hole, options)
    assert data.to_picture(restored) == data.to_picture(data.paste(painted, image, hole)[0])


@pytest.mark.parametrize("box", [(67, 60, 57, 57), (0, 100, 57, 20), (128, 135, 13, 57)])
def test_a_hole_anywhere_in_a_larger_photo_is_shown_where_it_was_in_training(box, faces, shown):
    (ema, options), photo = network(), F.interpolate(faces[:1], scale_factor=3)[0]
    top, left, tall, wide = box  # in a bounding square of 57 = 3 * 19 pixels
    mask = torch.zeros(1, 192, 192)
    mask[:, top : top + tall, left : left + wide] = 1
    inpaint.fill(ema, options, photo, mask)
    ((_, damaged, hole, _),) = shown
    assert torch.equal(hole, data.center_hole(64, 0.3))
    # Around it is the photo, of three pixels the middle one; outside, its border is repeated.
    y0, x0 = (math.floor(at + size / 2 - 28.5) - 66 for at, size in ((top, tall), (left, wide)))
    rows, columns = ((start + 1 + 3 * torch.arange(64)).clamp(0, 191) for start in (y0, x0))
    expected = photo[:, rows][:, :, columns]
    right, moved = (((damaged[0] - z).abs() * (1 - hole[0])).mean() for z in (expected, expected.roll(1, 2)))
    assert right < 0.02
    assert right < 0.7 * moved


@pytest.mark.parametrize("model, share", [("gan", 0.5), ("unet", 0.25)])
def test_what_a_gan_painted_beside_the_hole_is_not_joined_because_nobody_judged_it(model, share, monkeypatch):
    options = options_for(model, "--res", "64")
    painted = torch.full((1, 3, 64, 64), 0.75)
    painted[:, :, 22:41, 22:41] = 0.5  # right in the hole, too bright beside it
    monkeypatch.setattr(inpaint, "run_ema", lambda *_: painted.clone())
    photo = torch.full((3, 64, 64), 0.5)
    mask = data.center_hole(64, 0.3)[0]
    restored = inpaint.fill(inpaint.build_generator(options), options, photo, mask)
    assert restored[:, 31, 31].mean() == pytest.approx(share, abs=0.01)


def test_a_network_for_photos_is_shown_the_rectangle_around_a_hole_and_sees_the_same_square(faces, shown):
    (ema, options), mask, rectangle = network("--wild"), torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    mask[:, 22:41, 25:30] = mask[:, 35:41, 25:38] = 1  # an L
    rectangle[:, 22:41, 25:38] = 1
    inpaint.fill(ema, options, faces[0], mask)
    ((_, damaged, hole, _),) = shown
    assert torch.equal(hole[0], rectangle)
    assert (damaged[0] - data.damage(faces[0], rectangle)).abs().max() < 1e-6


def marked(size, *boxes):
    """A mask (1, size, size) with holes (top, left, tall, wide)."""
    mask = torch.zeros(1, size, size)
    for top, left, tall, wide in boxes:
        mask[:, top : top + tall, left : left + wide] = 1
    return mask


def test_dust_and_scratches_are_filled_smoothly_and_no_network_sees_them(faces, shown):
    (ema, options), hole = network("--wild"), marked(200, (60, 60, 60, 60))
    photo = F.interpolate(faces[:1], 200, mode="bilinear")[0]
    thin = marked(200, (20, 20, 2, 2), (150, 30, 7, 7), (0, 150, 200, 4), (90, 0, 4, 150))
    alone = inpaint.fill(ema, options, photo, thin)
    smooth = models.harmonic((photo * (1 - thin))[None], thin[None])[0]
    assert (alone - smooth).abs().max() < 0.01
    assert not shown, "it is all thin"
    both = inpaint.fill(ema, options, photo, (thin + hole).clamp(max=1))
    ((_, _, seen, _),) = shown
    assert 0.75 < seen.sum() / 19**2 <= 1, "nearly as if no scratch led into it"
    outside = thin * (1 - F.max_pool2d(hole, 31, 1, 15))
    assert ((both - alone) * outside).abs().max() < 0.01
    y, x = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    disc = ((y - 100) ** 2 + (x - 100) ** 2 < 50**2).float()[None]
    assert torch.equal(inpaint.thick_part(disc, 1, 6), disc), "a round hole keeps its border"


def test_each_hole_has_a_view_of_its_own_in_which_the_others_are_filled_smoothly(shown):
    (ema, options), photo = network("--wild"), torch.full((3, 192, 192), 0.7)
    near, far = (40, 40, 38, 38), (110, 110, 38, 38)
    inpaint.fill(ema, options, photo, marked(192, near, far))
    assert [int(hole.sum()) for _, _, hole, _ in shown] == [19 * 19] * 2
    assert all(((damaged - 0.7) * (1 - hole)).abs().max() < 0.01 for _, damaged, hole, _ in shown)
    shown.clear()
    inpaint.fill(ema, options, photo, marked(192, (40, 40, 38, 18), (40, 60, 38, 18)))
    assert len(shown) == 1, "two holes that nearly touch are one"
    ring = marked(192, (20, 20, 150, 150)) - marked(192, (40, 40, 110, 110)) + marked(192, (80, 80, 20, 20))
    for mask in (marked(192, near, far, (0, 0, 9, 5), (180, 183, 12, 9)), ring):
        boxes = inpaint.holes(mask, 1, 0)
        drawn_again = marked(192, *[(a, b, c - a, d - b) for a, b, c, d in boxes])
        assert (drawn_again >= mask).all()
        assert len(boxes) == (4 if mask is not ring else 1)


def test_500_dots_on_a_large_photo_take_seconds(shown):
    (ema, options), mask = network("--wild"), torch.zeros(1, 1500, 2000)
    spots = torch.randint(0, 1400, (2, 500), generator=torch.Generator().manual_seed(0))
    for y, x in spots.T.tolist():
        mask[:, y : y + 8, x : x + 8] = 1
    began = time.process_time()
    restored = inpaint.fill(ema, options, torch.full((3, 1500, 2000), 0.4), mask)
    assert time.process_time() - began < 20
    assert (restored - 0.4).abs().max() < 0.001
    assert not shown


def test_a_grey_photo_keeps_a_grey_hole(tiny_run):
    drawn(100, 150).convert("L").save("me.png")
    Image.fromarray(holes()[4][::2, ::2]).save("m.png")
    assert restore(tiny_run, "me.png", "--mask", "m.png") == 0
    after = pixels_of("restored/me-restored.png")
    assert (after == after[..., :1]).all()


def test_a_restored_photo_keeps_the_meaning_of_its_colours(tiny_run):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, kept in (("RGB", True), ("RGBA", True), ("CMYK", False)):
        drawn(40, 40).convert(mode).save("me.tif", icc_profile=profile.replace(b"RGB ", b"CMYK", not kept))
        assert restore(tiny_run, "me.tif", "--out", mode) == 0
        assert Image.open(f"{mode}/me-restored.png").info.get("icc_profile") == (profile if kept else None)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG", "WEBP", "broken"])
def test_a_restored_photo_keeps_what_its_file_tells_of_it(kind, tiny_run, capsys):
    exif = Image.Exif()
    exif[0x0112], exif[0x0132] = 6, "2020:05:17 12:00:00"  # turned, date
    exif[0x8769] = {0x9003: "2019:05:17 12:00:00"}  # taken
    exif[0x8825] = {2: (52.0, 22.0, 12.5)}  # latitude
    if kind == "broken":
        drawn(40, 60).save("me.jpg", "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    else:
        drawn(40, 60).save("me.jpg", kind, exif=exif.tobytes())
    assert restore(tiny_run, "me.jpg") == 0
    restored, told = Image.open("restored/me-restored.png"), complaints(capsys.readouterr().err)
    kept = restored.getexif()
    if kind == "broken":
        assert not kept
        assert len(told) == 1
        assert "me.jpg: its EXIF (date, camera, place) is left out" in told[0]
    else:
        assert restored.size == (60, 40)
        assert (kept[0x0112], kept[0x0132]) == (1, exif[0x0132])
        assert kept.get_ifd(0x8769)[0x9003] == "2019:05:17 12:00:00"
        assert kept.get_ifd(0x8825)[2] == (52.0, 22.0, 12.5)
        assert not {256, 257, 258, 273, 279} & set(kept), "where the pixels of a TIFF were"
        assert not told


def test_photos_are_restored_in_the_given_precision_or_the_devices_fast_one(tiny_run, shown, monkeypatch):
    state = torch.load(tiny_run / "generator.pt", weights_only=True)
    torch.save(state | {"options": state["options"] | {"precision": "bfloat16"}}, "generator.pt")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    drawn(40, 40).save("me.png")
    assert restore(Path(), "me.png") == 0
    assert restore(Path(), "me.png", "--precision", "bfloat16") == 0
    assert [options["precision"] for *_, options in shown] == ["float32", "bfloat16"]


def test_masks_as_people_make_them_are_understood_and_their_share_is_told(capsys):
    hole, photo = holes()[5], Image.new("RGB", (200, 300))
    brush = np.full((300, 200, 4), 255, np.uint8)  # all white, and transparent where nothing is missing
    brush[..., 3] = hole * 255
    red = np.zeros((300, 200, 3), np.uint8)
    red[..., 0] = hole * 255
    soft = Image.fromarray(hole * np.uint8(255)).resize((100, 150), Image.Resampling.BICUBIC)
    masks = {"exact": hole * np.uint8(255), "alpha": brush, "1 and 0": hole * np.uint8(1), "red": red}
    masks |= {"16 bit": hole * np.uint16(65535), "soft": np.array(soft)}
    for name, values in masks.items():
        Image.fromarray(values).save(name + ".png")
        mask, told = inpaint.read_mask(name + ".png", photo), capsys.readouterr().err
        assert mask.shape == (1, 300, 200)
        assert mask.unique().tolist() == [0, 1]
        assert (mask[0].numpy() != hole).mean() <= (0.02 if name == "soft" else 0)
        assert f"--mask {name}.png: {mask.mean():.1%} of the photo is to be filled\n" == told
    Image.fromarray(~hole).save("m.png")
    inpaint.read_mask("m.png", photo)
    assert "91.6% of the photo is to be filled (white is what is to be filled" in capsys.readouterr().err
    Image.fromarray(np.mgrid[:1502, :2000][0] < 400).save("m.png")  # larger, by the rounding of a pixel
    assert inpaint.read_mask("m.png", Image.new("RGB", (500, 376))).shape == (1, 376, 500)


def test_of_a_mask_painted_on_a_larger_scan_no_pixel_is_lost():
    for size in ((100, 150), (133, 200), (399, 599)):  # 4, 3 and nearly 1 mask pixels for one of the photo
        scan = Image.new("L", (400, 600))
        ImageDraw.Draw(scan).line((3, 7, 390, 580), 255, 2)  # a slanting scratch
        scan.save("m.png")
        mask = inpaint.read_mask("m.png", Image.new("RGB", size))[0]
        y, x = np.nonzero(np.asarray(scan))
        expected = torch.zeros(size[::-1])
        for up, left in itertools.product((0, 1 - 1e-6), repeat=2):  # the corners of each white pixel
            expected[((y + up) * size[1] / 600).astype(int), ((x + left) * size[0] / 400).astype(int)] = 1
        assert torch.equal(mask, expected)


def test_photos_of_any_name_are_restored_but_no_outputs_and_nothing_is_overwritten(tiny_run, capsys):
    Path("in").mkdir()
    photos_there = ["[1] ä.jpg", "a.b.jpg"]
    for name in photos_there:
        drawn(40, 40).save(Path("in", name))
    Path("in/2.heic").touch()
    assert restore(tiny_run, "in", "--out", "in") == 0
    assert "in: 1 files of other kinds are skipped (1 .heic)" in capsys.readouterr().err
    first = {file: file.read_bytes() for file in Path("in").iterdir()}
    assert restore(tiny_run, "in", "--out", "in") == 0
    kinds = [f"{number}-{kind}.png" for number in ("", "-2") for kind in ("restored", "compare")]
    names = {Path(name).stem + kind for name in photos_there for kind in kinds}
    assert {file.name for file in Path("in").iterdir()} == {*names, *photos_there, "2.heic"}
    assert all(file.read_bytes() == content for file, content in first.items())
    assert restore(tiny_run, "in/a.b-restored.png") == 0  # named by its user, it is restored once more
    assert Path("restored/a.b-restored-restored.png").exists()
    Path("restored/a.b-restored-compare.png").unlink()
    assert restore(tiny_run, "in/a.b-restored.png") == 0
    assert Path("restored/a.b-restored-2-compare.png").exists(), "two that belong together have one number"
    assert restore(tiny_run, "restored") == 2  # there is no other picture in it
    assert "restored holds only pictures that this program wrote" in capsys.readouterr().err


def test_photos_that_fail_are_named_with_the_reason_and_others_are_restored(tiny_run, capsys, monkeypatch):
    write_photos("in", 6, 40)
    Path("in/001.jpg").write_bytes(b"broken")
    forbid(monkeypatch, Path, "read_bytes", "002.jpg")
    save = data.save

    def save_or_fail(path, content):
        if Path(path).name == "003-restored.png":
            raise OSError(28, "No space left", str(path))
        save(path, content)

    monkeypatch.setattr(data, "save", save_or_fail)
    capsys.readouterr()
    assert restore(tiny_run, "in", "in/gone.jpg") == 2
    assert len(list(Path("restored").glob("*-restored.png"))) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 of 7 photos are restored" in line
    assert "in/001.jpg: not a picture" in line
    assert "in/002.jpg cannot be read (Permission denied): see who may read it" in line
    assert "No space left: 'restored/003-restored.png'" in line
    assert "in/gone.jpg does not exist" in line


# === inpaint.py: the command, and what it refuses =================================================


def started(line, *argv):
    """The program, started by a line of sh in which "$@" stands for it, with 40 drawn faces."""
    code = f"import sys; sys.path[:0] = {[str(HERE)]}; import data, inpaint, losses; "
    code += "data.SYNTHETIC = 40; losses.PATCHES = 512; inpaint.main()"
    words = ["sh", "-c", line, "sh", sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_help_prints_the_true_numbers_of_the_recipes(capsys):
    assert command("--help") == 0
    cards = re.findall(r"^  --model (\w+): (.+)$", capsys.readouterr().out, re.MULTILINE)
    read = {model: vars(inpaint.parser().parse_args(words.split())) for model, words in cards}
    assert read == inpaint.RECIPES


def test_help_tells_what_every_option_is_for_and_what_it_is_by_default():
    actions = {action.dest: action for action in inpaint.parser()._actions}
    assert set(inpaint.TRAINING) <= set(actions)
    assert all(action.help for action in actions.values())
    defaults = inpaint.DEFAULTS | {"model": "unet", "data": "drawn faces"}
    del defaults["wild"]
    for name, default in defaults.items():
        (told,) = re.findall(r"\(([^;:)]+)", actions[name].help)
        assert (actions[name].type or str)(told) == default, name


GIVEN = [
    {"loss": "l1"}, {"loss": "mse", "lr": 0.1}, {"res": 256}, {"act": "swish"}, {"wild": True},
    {"hole": 0.4}, {"batch": 64}, {"epochs": 99}, {"seed": 7},
]  # fmt: skip
GIVEN_TO_A_GAN = [{"judge": "restored", "hole": 0.5}, {"augment": "none"}]


@pytest.mark.parametrize("model", inpaint.RECIPES)
def test_what_is_given_changes_no_other_option(model):
    words = ["--model", model, "--lr", "0.1", "--wild"]
    assert vars(inpaint.parser().parse_args(words)) == {"model": model, "lr": 0.1, "wild": True}
    usual = inpaint.recipe({"model": model})
    assert usual == inpaint.DEFAULTS | inpaint.RECIPES[model] | {"model": model}
    for given in [*GIVEN, *(GIVEN_TO_A_GAN if model == "gan" else [])]:
        assert inpaint.recipe({"model": model} | given) == usual | given


def test_a_cpu_trains_in_bfloat16_only_where_that_is_faster(monkeypatch):
    intel, amd, fast = {"cpu_name": "Intel Xeon"}, {"cpu_name": "AMD EPYC"}, {"avx512_bf16": True}
    expected = [(intel, "float32"), (amd, "float32"), (intel | fast, "float32"), (amd | fast, "bfloat16")]
    expected += [(intel | fast | {"amx_bf16": True}, "bfloat16"), ({}, "float32"), (fast, "float32")]
    for cpu, precision in expected:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda cpu=cpu: cpu, raising=False)
        assert inpaint.choose_precision("auto", CPU) == precision
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before PyTorch 2.11
    assert inpaint.choose_precision("auto", CPU) == "float32"
    assert inpaint.choose_precision("bfloat16", CPU) == "bfloat16"


def test_without_autocast_float32_trains_and_bfloat16_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: False)  # as PyTorch 2.4 on a Mac
    monkeypatch.setattr(torch, "autocast", failing(RuntimeError("unsupported autocast device_type 'mps'")))
    words = ["--model", "gan", "--loss", "l1+dssim+adversarial", "--epochs", 1, "--out", "run", *TINY]
    words += ["--precision"]
    assert command(*words, "float32") == 0
    for words in (words, ["--evaluate", "run/generator.pt", "--device", "cpu", "--precision"]):
        assert command(*words, "bfloat16") == 2
        assert "it takes float32" in capsys.readouterr().err
    state = last_state("run")
    torch.save(state | {"epoch": 0, "options": state["options"] | {"precision": "bfloat16"}}, "run/last.pt")
    assert command("--resume", "run", "--device", "cpu") == 2
    assert "it takes float32" in capsys.readouterr().err


@needs_gpu
def test_a_gpu_trains_resumes_and_agrees_with_the_cpu_wherever_the_pictures_lie(monkeypatch, capsys):
    words = ["--precision", "float32", "--out", "gpu", *TINY[:-2], "--device", "cuda"]
    assert command("--epochs", 1, *words) == 0
    monkeypatch.setattr(data, "to_gpu_if_it_fits", lambda images, device: images)
    assert command("--resume", "gpu", "--epochs", 2, "--device", "cuda") == 0
    pixels, order, flip = data.synthetic_faces(24, 32), torch.randperm(24), torch.rand(24) < 0.5
    pairs = zip(*(data.batches(pixels, 8, order, flip, torch.device(name)) for name in ("cpu", "cuda")))
    assert all(two.is_cuda and torch.allclose(one, two.cpu()) for one, two in pairs)
    capsys.readouterr()
    assert command("--evaluate", "gpu/generator.pt", "--device", "cpu") == 0
    assert abs(json.loads(capsys.readouterr().out)["psnr_hole"] - results("gpu")["psnr_hole"]) < 0.01


MEMORY = "inpaint.py: out of memory: try a smaller --batch"
ERRORS = [
    (OSError(errno.ENOSPC, "No space left", "a.pt"), "No space left: 'a.pt': see whether there is room"),
    (RuntimeError("CUDA out of memory. Tried to allocate"), MEMORY),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MEMORY),
    (MemoryError(), MEMORY),
    (KeyboardInterrupt(), "stopped; start again with the same command"),
]


@pytest.mark.parametrize("error, told", ERRORS)
def test_an_error_of_the_machine_is_told_in_one_line_with_advice(error, told, monkeypatch, capsys):
    monkeypatch.setattr(inpaint, "Run", failing(error))
    assert command("--out", "a/run", *TINY) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert not Path("a").exists()
    (line,) = complaints(capsys.readouterr().err)
    assert told in line


def test_an_error_of_ours_is_not_told_as_one_of_the_user(monkeypatch):
    monkeypatch.setattr(inpaint, "Run", failing(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        command(*TINY)


class Evil:
    """A pickle of this would make a folder when it is read."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.fixture
def traps(tmp_path, tiny_run, monkeypatch):
    """Every wrong input that the table below names, in the working directory."""
    write_photos("good", 4, 40)
    for name in ("empty", "text", "half"):
        Path(name).mkdir()
    for name in ("text/a.txt", "file"):
        Path(name).write_text("no picture")
    good = (tiny_run / "generator.pt").read_bytes()
    raw = {"good": good, "half/last": good[: len(good) // 2], "pickle": pickle.dumps(Evil())}
    for name, content in raw.items():
        Path(f"{name}.pt").write_bytes(content)
    Path("cut.zip").write_bytes(zip_folder(Path("good")).read_bytes()[:-30])
    masks = {"black": Image.new("L", (40, 40)), "white": Image.new("1", (40, 40), 1)}
    masks |= {"clear": Image.new("LA", (40, 40), (255, 0)), "tall": Image.new("L", (40, 90))}
    masks |= {"photo": drawn(90, 120), "less": Image.new("L", (89, 117)), "more": Image.new("L", (180, 236))}
    for name, mask in masks.items():
        mask.save(f"{name}.png")
    state = torch.load("good.pt", weights_only=True)
    wrong = {"other": {"weights": torch.rand(3)}, "list": [1, 2], "none": state | {"options": None}}
    wrong |= {"version": state | {"kind": "face inpainting checkpoint"}, "evil": state | {"kind": Evil()}}
    for changed in ({"res": 33}, {"width": 5}, {"batch": "8"}, {"depth": 9}):
        wrong[next(iter(changed))] = state | {"options": state["options"] | changed}
    for name, content in wrong.items():
        torch.save(content, f"{name}.pt")
    shutil.copytree(tiny_run, "run")
    Path("renamed").mkdir()
    shutil.copy("good.pt", "renamed/last.pt")
    monkeypatch.setattr(data, "SYNTHETIC", 30)
    return tmp_path


BAD_VALUES = {
    "res": "0 -64 7 63 1024 64.5", "hole": "0 1.1 -0.1 nan x", "val": "0 1.5 nan", "epochs": "0 -1 1.5 x",
    "batch": "0 -8 1.5", "width": "0 -4 1025", "depth": "0 -1 10", "limit": "0 257", "lr": "0 -0.1 nan inf",
    "hole-weight": "0 nan inf", "seed": "-1 9e9", "device": "tpu", "act": "gelu", "model": "vae",
    "colour": "red", "loss": "l3 features", "judge": "fake", "augment": "jitter",
}  # fmt: skip
REFUSED = {  # words: a part of the line
    **{f"--{name}={value}": f"--{name}" for name, values in BAD_VALUES.items() for value in values.split()},
    **{f"--evaluate {name}.pt": "no checkpoint of this program, or damaged" for name in (
        "pickle evil other list none version width batch depth").split()},
    "--restore good/000.jpg --checkpoint good.pt --mask black.png": "--mask black.png is all black: white is",
    "--restore good/000.jpg --checkpoint good.pt --mask clear.png": "--mask clear.png is all black: white is",
    "--restore good/000.jpg --checkpoint good.pt --mask white.png": "--mask white.png is all white",
    "--restore good/000.jpg --checkpoint good.pt --mask tall.png": "tall.png is 40 x 90, the photo 40 x 40",
    "--restore photo.png --checkpoint good.pt --mask less.png": "less.png is 89 x 117, the photo 90 x 120",
    "--restore photo.png --checkpoint good.pt --mask more.png": "more.png is 180 x 236, the photo 90 x 120",
    "--evaluate file": "no checkpoint", "--evaluate nothing.pt": "nothing.pt cannot be read (No such file",
    "--evaluate run": "run cannot be read (Is a directory): give the generator.pt",
    "--evaluate good.pt --seed 9": "--seed 9 contradicts --seed 0", "--evaluate good.pt --hole 0.999": "wide",
    "--evaluate good.pt --data nowhere": "does not exist", "--evaluate good.pt --compare": "not allowed with",
    "--data nowhere": "nowhere does not exist", "--data empty": "holds no picture",
    "--data text": "holds no picture (.jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff); it holds 1 .txt",
    "--data file": "file is no zip", "--data cut.zip": "cut.zip is no zip, or is cut off",
    "--data good --val 0.01": "leaves 4 to train on and 0", "--data good --val 0.8": "leaves 1 to train",
    "--val 1": "leaves 0 to train", "--hole 0.001": "0 pixels wide", "--hole 0.999": "32 pixels wide",
    "--model unet --loss 30*l1+adversarial": "needs a discriminator, which --model unet has not: add --model",
    "--judge output": "--judge does nothing with --loss l1",
    "--model gan --hole 0.5": "nearly fills the middle half: take --judge restored",
    "--depth 6": "--depth 6 halves --res 32", "--device cuda": "has none",
    "--mask m.png": "--mask does nothing without --restore", "--seeds 2": "does nothing without --compare",
    "--checkpoint good.pt": "does nothing without --restore",
    "--out file": "--out file cannot be made", "--out file/run": "Not a directory",
    "--out run": "--out run already holds files: name another folder, or go on with --resume run",
    "--out=": "--out is empty", "--restore= --checkpoint good.pt": "--restore is empty",
    "--resume run --out x": "--out does nothing with --resume",
    "--resume": "--resume", "--resume half": "no checkpoint of this program",
    "--resume file": "cannot be read (Not a directory)",
    "--resume nowhere": "cannot be read (No such file or directory): give the folder of a run",
    "--resume renamed": "renamed/last.pt is not all that a run needs",
    "--resume run --model gan": "--model gan contradicts --model unet",
    "--resume run --loss mse": "--loss mse contradicts --loss l1",
    "--resume run --epochs 3": "holds 30 pictures, the run in run had 40",
    "--resume run --epochs 1": "--epochs 1 contradicts --epochs 2",
    "--restore good": "--restore needs --checkpoint", "--restore nowhere.jpg --checkpoint good.pt": "0 of 1",
    "--restore good --checkpoint good.pt --out b.PNG": "--out b.PNG is named like a picture",
    "--restore good --checkpoint good.pt --res 64": "--res 64 contradicts --res 32",
    "--compare --model gan": "--model does nothing with --compare", "--compare --data nowhere": "not exist",
    **{f"--compare --{name} {value}": f"--{name} does nothing with --compare, whose rows decide it"
       for name, value in (("batch", 8), ("lr", 1e-3), ("judge", "output"), ("loss", "l1"))},
    "--compare --hole 0.001": "0 pixels",
    "--compare --seeds 0": "--seeds 0",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_a_mistake_is_refused_in_one_clear_line_and_nothing_is_written(words, traps, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(inpaint, "training_step", failing(AssertionError("it was not refused")))
    before = contents(traps), set(traps.rglob("*"))
    jobs = ("--evaluate", "--resume", "--compare", "--restore", "--checkpoint")
    size = [] if any(job in words for job in jobs) else ["--res", 32, "--width", 4]
    assert command(*size, *words.split()) == 2
    told = complaints(capfd.readouterr().err)
    assert len(told) == 1, told
    assert told[0].startswith("inpaint.py: ")
    assert REFUSED[words] in told[0]
    for folder in ("cache", "restored"):
        shutil.rmtree(folder, ignore_errors=True)
    assert (contents(traps), set(traps.rglob("*"))) == before


def damaged(content, chances):
    """The bytes of a file with some of them changed, and perhaps without its end."""
    raw = bytearray(content)
    for _ in range(chances.randrange(100)):
        raw[chances.randrange(len(raw))] = chances.randrange(256)
    return bytes(raw[: chances.choice([len(raw), chances.randrange(len(raw))])])


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=slow)])
def test_damaged_files_are_read_or_refused_and_nothing_else(count, tiny_run):
    chances = random.Random(1)
    whole = {suffix: encoded(drawn(64, 64), kind) for suffix, kind in ((".jpg", "JPEG"), (".png", "PNG"))}
    whole[".zip"] = photos(1, packed=True).read_bytes()
    whole[".pt"] = (tiny_run / "generator.pt").read_bytes()
    refused = set()
    for number, suffix in zip(range(count), itertools.cycle(whole)):
        file = Path(str(number), "a" + suffix)
        file.parent.mkdir()
        file.write_bytes(damaged(whole[suffix], chances))
        try:
            if suffix == ".pt":
                inpaint.read_checkpoint(file)
            else:
                data.load_images(file if suffix == ".zip" else file.parent, 32)
        except InputError:
            refused.add(suffix)
    assert refused == set(whole)


@slow
def test_two_runs_started_together_end_well_with_one_cache_and_two_folders():
    write_photos("photos", 60, 64)
    runs = [started('exec "$@"', "--data", "photos", "--epochs", 1, *TINY) for _ in range(2)]
    assert [(complaints(run.communicate()[1]), run.returncode) for run in runs] == [([], 0)] * 2
    assert {folder.name for folder in Path("runs").iterdir()} == {"unet-l1-relu-32", "unet-l1-relu-32-2"}
    assert len({file.read_bytes() for file in Path("runs").glob("*/generator.pt")}) == 1
    assert len(cache_files()) == 1
