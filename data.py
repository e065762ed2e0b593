"""File 1 of 4, data.py: all that reads, damages or draws pictures (paper, section 2.1, figures 1 and 4).

The lesson is the first three sections, about 130 lines. What you learn there:

    The hole               how a picture is damaged, and how a restored one is put together
    Split and batches      who is trained on and who is not; how batches are taken from one tensor of bytes
    Framing                how a training picture is framed as people frame their photos

The rest is plumbing, for when you ask how a file becomes pixels (One photograph), how many become one tensor
(A data set), how a face is drawn with nothing but ellipses (Faces that are drawn), how a file is written so
that it is never half there (Writing), or what is shown (Grids and charts, The screen).

    pixels  uint8 (N, 3, res, res)    on disk and in the data set, because a byte is enough
    image   float (B, 3, res, res)    in [0, 1], everywhere else
    mask    float (B, 1, res, res)    1 in the hole, 0 where the picture is known

Try it:  python -c "import data; data.grid([('faces', data.synthetic_faces(8, 64, 0))]).save('faces.png')"
"""

import collections
import contextlib
import csv
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

# --- The hole -------------------------------------------------------------------------------------


def center_span(res: int, fraction: float) -> tuple[int, int]:
    """Where the paper's hole starts and ends along each axis, the end just outside: (22, 41) for 64 and 0.3.

    side = round(res * fraction), start = (res - side) // 2.
    """
    side = round(res * fraction)
    start = (res - side) // 2
    return start, start + side


def center_hole(res: int, fraction: float) -> torch.Tensor:
    """The paper's hole as a mask (1, 1, res, res): a centred square, `fraction` of the side (section 2.1)."""
    start, end = center_span(res, fraction)
    mask = torch.zeros(1, 1, res, res)
    mask[..., start:end, start:end] = 1
    return mask


def damage(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """White where the mask is 1 (section 2.1, figure 1): image (B, 3, H, W) in [0, 1] -> the same shape."""
    return image * (1 - mask) + mask


def paste(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The output in the hole, the image elsewhere: the restored picture, which a user keeps.

    Nothing is changed to fit: at the rim there may be a step, which inpaint.join takes out of a photo.
    """
    return output * mask + image * (1 - mask)


# --- Split and batches ----------------------------------------------------------------------------


def split(pixels: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part): the first and the last by name (section 2.5: 80 % and 20 %).

    By order and not at random: for all of CelebA this is nearly the official partition, in which nobody is
    on both sides.
    """
    cut = len(pixels) - round(len(pixels) * share)
    return pixels[:cut], pixels[cut:]


def to_gpu_if_it_fits(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The training set on the GPU if it takes under half of the free memory there; else where it is."""
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return pixels.to(device)
    return pixels


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last, the fastest, but not on a Mac's GPU, where it goes wrong (pytorch #175189, #188371)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def batches(training: torch.Tensor, size: int, order: torch.Tensor, flip: torch.Tensor, device: torch.device):
    """Yield the batches of an epoch: image (size, 3, H, W), float in [0, 1], on `device`.

    `order` (steps * size) says which pictures, `flip` (steps * size) which of them are mirrored. There is no
    DataLoader: picking rows of one tensor takes less time than handing them from process to process.
    """
    order = order.to(training.device)
    flip = flip.to(device)
    for start in range(0, len(order), size):
        pixels = training[order[start : start + size]]
        if device.type == "cuda" and not training.is_cuda:
            pixels = pixels.pin_memory()  # so that the copy need not wait for the device
        # On a Mac's GPU, a copy that does not wait can read memory that is freed (pytorch #139550, #189690).
        pixels = pixels.to(device, non_blocking=device.type == "cuda")
        image = pixels.to(memory_format=memory_format(device)).float().div_(255)
        yield torch.where(flip[start : start + size, None, None, None], image.flip(3), image)


# --- Framing --------------------------------------------------------------------------------------


def frame(image: torch.Tensor, framing: torch.Tensor) -> torch.Tensor:
    """Training pictures framed at random, as people frame their photos (section 4, "in-the-wild").

    image (B, 3, res, res) -> the same shape; framing (B, 5) holds uniform numbers in [0, 1). Three tenths
    stay as they are. The others are zoomed by 1 / 1.5 to 1.5 (uniform in the logarithm) and turned by up to
    5 degrees, and what is in their middle changes: up to 15 % of the side to the left or right, and from 5 %
    higher to 30 % lower, down to the mouth of a face that is cut like CelebA's. Beyond the border, the
    picture is reflected.
    """
    u1, u2, u3, u4, u5 = framing.unbind(1)
    zoom = 1.5 ** (2 * u2 - 1)
    angle = math.radians(5) * (2 * u3 - 1)
    across = 2 * 0.15 * (2 * u4 - 1)  # for affine_grid a picture is 2 wide
    down = 2 * (0.35 * u5 - 0.05)
    cosine = torch.cos(angle) / zoom
    sine = torch.sin(angle) / zoom
    moved = torch.stack([cosine, -sine, across, sine, cosine, down], 1).view(-1, 2, 3)
    as_it_is = torch.eye(2, 3, device=image.device)
    affine = torch.where(u1[:, None, None] < 0.3, as_it_is, moved)
    points = F.affine_grid(affine, list(image.shape), align_corners=False)
    return F.grid_sample(image, points, padding_mode="reflection", align_corners=False)


def random_boxes(n: int, res: int, fraction: float, rng: torch.Generator) -> torch.Tensor:
    """Holes for --wild, all in the middle, where every photo's hole is shown (inpaint.view).

    n boxes -> (n, 4) whole numbers: top, left, bottom, right, the last two just outside. Half are the
    paper's square. The others keep one of its sides; the other side is drawn uniformly from a quarter of it
    to all of it.
    """
    side = round(res * fraction)
    long = torch.full((n, 1), side)
    short = torch.randint(max(1, side // 4), side + 1, (n, 1), generator=rng)
    flat = torch.rand(n, 1, generator=rng) < 0.5
    square = torch.rand(n, 1, generator=rng) < 0.5
    size = torch.where(flat, torch.cat([short, long], 1), torch.cat([long, short], 1))
    size = torch.where(square, side, size)
    corner = (res - size) // 2
    return torch.cat([corner, corner + size], 1)


def box_mask(boxes: torch.Tensor, res: int) -> torch.Tensor:
    """Boxes (B, 4) -> mask (B, 1, res, res), 1 in the hole."""
    line = torch.arange(res, device=boxes.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    rows = (line >= top) & (line < bottom)  # (B, res)
    columns = (line >= left) & (line < right)
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


# The lesson ends here: read on in models.py. The rest is plumbing, needed when you ask how pictures come in,
# go out and are shown.

# --- One photograph: a file becomes pixels --------------------------------------------------------


class InputError(Exception):
    """A mistake of the user, told in one line: what was wrong, where, what to do about it."""


def open_photo(content: bytes, shortest: int | None = None, behind: str = "white") -> Image.Image:
    """The bytes of a picture file -> upright RGB picture, its first frame.

    What is transparent is laid on the colour `behind`. With `shortest`, a JPEG that is at least twice as
    large is decoded at 1/2, 1/4 or 1/8 of its size: its 8 x 8 blocks of frequencies can be read as 4 x 4,
    which saves most of the work. InputError if it is no picture, or if its range is unknown.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # Pillow's, of damaged EXIF
        try:
            picture = Image.open(io.BytesIO(content))
            if shortest:
                picture.draft(None, (shortest, shortest))
            picture.load()
        except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error
            why = str(error).partition(" <")[0] or type(error).__name__  # then comes an address in memory
            raise InputError(f"not a picture that can be read ({why})") from error
        with contextlib.suppress(Exception):  # an orientation that cannot be read does not cost the picture
            ImageOps.exif_transpose(picture, in_place=True)
    return to_rgb(picture, behind)


def to_rgb(picture: Image.Image, behind: str) -> Image.Image:
    """Any mode -> 8-bit RGB. InputError for 32 bits."""
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(deep_grey(picture)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, behind)
    flat = Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
    flat.info["icc_profile"] = picture.info.get("icc_profile")  # what its colours mean on a screen
    return flat


def deep_grey(picture: Image.Image) -> np.ndarray:
    """16-bit grey -> uint8 (H, W), divided by 257, where Pillow would clip it.

    InputError for 32 bits, because no file says which number is white: 1, 255, 65535 or another.
    """
    is_16_bit = picture.mode == "I" and picture.format in ("PNG", "PPM")  # these hold no 32-bit integers
    if picture.mode in ("I", "F") and not is_16_bit:
        raise InputError(f"its range is unknown (mode {picture.mode}): save it with 8 or 16 bits")
    values = np.asarray(picture)
    if values.max() < 65536 / 8:
        say_once("a 16-bit picture is nearly black: it looks like 10 or 12 bits, but 16 are assumed")
    return (values / 257).round().astype(np.uint8)


def central_square(picture: Image.Image, res: int) -> Image.Image:
    """The largest centred square, scaled to res x res with a Lanczos filter."""
    side = min(picture.size)
    left = (picture.width - side) // 2
    top = (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((res, res), Image.Resampling.LANCZOS)


def crop_resize(z: torch.Tensor, box: tuple, size: tuple[int, int]) -> torch.Tensor:
    """Scale the part of z (C, H, W) in a box of real-valued corners to size (w, h) -> (C, h, w).

    The box is (left, top, right, bottom) and may leave the picture. Beyond the border, the border's pixels
    are repeated.
    """
    shrink = int((box[2] - box[0]) / size[0] / 8)
    if shrink > 1:  # more than 8 pixels for one: take means first, or a large photo's box fills the memory
        z = F.avg_pool2d(z, shrink, ceil_mode=True)
        box = [end / shrink for end in box]
    height, width = z.shape[1:]
    x, y = math.floor(box[0]), math.floor(box[1])
    right, bottom = math.ceil(box[2]), math.ceil(box[3])
    inside = z[:, max(y, 0) : bottom, max(x, 0) : right]
    beyond = (max(-x, 0), max(right - width, 0), max(-y, 0), max(bottom - height, 0))
    planes = F.pad(inside, beyond, mode="replicate").numpy()
    inner = (box[0] - x, box[1] - y, min(box[2] - x, right - x), min(box[3] - y, bottom - y))
    lanczos = Image.Resampling.LANCZOS  # as the training pictures were scaled
    scaled = [np.asarray(Image.fromarray(plane).resize(size, lanczos, inner, 3.0)) for plane in planes]
    return torch.from_numpy(np.stack(scaled))


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_float(pixels: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8, any shape -> float in [0, 1], on the device."""
    return pixels.to(device).float() / 255


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W), uint8 or float in [0, 1] -> RGB picture."""
    if image.is_floating_point():
        image = image.float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())

# --- A data set: a folder or zip becomes one tensor -----------------------------------------------

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LITTER = {"__MACOSX", "@eaDir", "$RECYCLE.BIN"}  # what macOS adds to a zip, a NAS and Windows to a folder
OURS = {"runs", "restored", "cache"}  # what this program adds


def load_images(path: str | Path, res: int, cache: str | Path = "cache") -> torch.Tensor:
    """A folder (searched to the bottom) or a .zip of pictures -> uint8 (N, 3, res, res), sorted by name.

    Each picture is turned upright, made RGB, cut to its central square and scaled. This is done once; the
    result is kept in `cache`, from where it is mapped into memory. The file's name holds a checksum of the
    pictures' names, sizes and times, so changed pictures are read anew. Up to 5 % broken pictures are named
    and left out; InputError if more are, if one cannot be read, or if there is none.
    """
    path = Path(path)
    pictures = find_pictures(path)
    where = checksum(os.path.abspath(path))
    try:
        content = checksum([stamp(*pair) for pair in pictures])
    except OSError as error:
        raise cannot_read(error.filename or path, error) from error
    file = Path(cache, f"{path.stem}-{where}-{res}-{content}.bytes")
    pixels = read_cache(file, res, len(pictures))
    if pixels is not None:
        if len(pixels) < len(pictures):
            say(f"{path}: {len(pictures) - len(pixels)} of {len(pictures)} pictures are broken and left out")
        return pixels
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{glob.escape(path.stem)}-{where}-{res}-*.bytes"):
            old.unlink()
        with whole_file(file) as stream:
            for picture in decode_all(path, pictures, res):
                stream.write(picture.tobytes())
        pixels = read_cache(file, res, len(pictures))
        if pixels is None:
            raise OSError(errno.EIO, "it cannot be read back")
        return pixels
    except OSError as error:
        say(f"warning: no cache can be kept in {file.parent} ({error.strerror}): reading for this run only")
        return torch.from_numpy(np.stack(list(decode_all(path, pictures, res))))


def checksum(value) -> str:
    """Twelve hexadecimal digits that change with the value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def find_pictures(path: Path) -> list[tuple]:
    """(name, file or entry of the zip) of every picture in a folder or zip, sorted by name.

    Folders are searched to the bottom, linked ones too. What is left out is told. InputError if there is no
    picture.
    """
    try:
        files = folder_files(path) if path.is_dir() else zip_entries(path)
    except OSError as error:
        raise cannot_read(error.filename or path, error) from error
    except Exception as error:  # the directory of a damaged zip can raise more than BadZipFile
        raise InputError(f"{path} is no zip, or is cut off ({error}): give a folder or whole .zip") from error
    pictures, passed_over, kinds = sort_out(files)
    if passed_over:
        say(f"{path}: pictures in folders named runs, restored or cache are passed over ({passed_over})")
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
    if not pictures:
        holds = f"; it holds {others}" if kinds else ""
        raise InputError(f"{path} holds no picture ({' '.join(PICTURES)}){holds}")
    if kinds:
        say(f"{path}: {kinds.total()} files of other kinds are skipped ({others})")
    return sorted(pictures, key=lambda pair: pair[0])


def sort_out(files: list[tuple]) -> tuple[list[tuple], int, collections.Counter]:
    """(the pictures, how many more are in folders named as in OURS, how many files of each other kind).

    Hidden files and folders and those in LITTER do not count.
    """
    pictures, passed_over, kinds = [], 0, collections.Counter()
    for name, file in files:
        parts = Path(name).parts
        is_picture = name.lower().endswith(PICTURES)
        if any(part.startswith(".") or part in LITTER for part in parts):
            continue
        if OURS.intersection(parts):
            passed_over += is_picture
        elif is_picture:
            pictures.append((name, file))
        else:
            kinds[Path(name).suffix.lower() or "no suffix"] += 1
    return pictures, passed_over, kinds


def folder_files(path: Path) -> list[tuple]:
    """(name, file) of every file below a folder; links are followed, and no folder is entered twice."""

    def fail(error):
        raise error

    files, entered = [], set()
    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        real_path = os.path.realpath(folder)
        if real_path in entered:  # a link that leads back
            folders.clear()
        else:
            files += [Path(folder, name) for name in names]
            entered.add(real_path)
    return [(file.relative_to(path).as_posix(), file) for file in files]


def zip_entries(path: Path) -> list[tuple]:
    """(name, entry) of every file in a zip. Two entries of one name are two files."""
    with zipfile.ZipFile(path) as archive:
        return [(entry.filename, entry) for entry in archive.infolist() if not entry.is_dir()]


def stamp(name: str, entry: Path | zipfile.ZipInfo) -> tuple:
    """What changes when a picture changes: name, size and time; in a zip name, size and checksum."""
    if isinstance(entry, zipfile.ZipInfo):
        return name, entry.file_size, entry.CRC
    return name, entry.stat().st_size, entry.stat().st_mtime_ns


def decode_all(path: Path, pictures: list[tuple], res: int):
    """Yield the pixels of every picture, uint8 (3, res, res); the broken ones are named at the end."""
    read = Path.read_bytes if path.is_dir() else zipfile.ZipFile(path).read
    broken = []
    began = time.time()
    for done, (name, entry) in enumerate(pictures):
        speed = (done + 1) / (time.time() - began + 1e-9)
        left = time_left(len(pictures) - done, speed)
        progress(f"reading {path.name}: {done}/{len(pictures)} pictures{left}")
        try:
            picture = open_photo(read(entry), res)
        except OSError as error:  # it may be a good picture
            raise cannot_read(path / name, error) from error
        except Exception as error:  # a damaged entry of a zip can raise anything
            broken.append(f"{name}: {error}")
        else:
            yield to_tensor(central_square(picture, res)).numpy()
    progress(None)
    told = f"{path}: {len(broken)} of {len(pictures)} pictures are broken"
    if len(broken) > 0.05 * len(pictures):
        raise InputError(f"{told}, the first are {'; '.join(broken[:5])}: mend or remove them")
    if broken:
        say("\n  ".join([f"{told} and left out:", *broken[:10]]))


def cannot_read(path: str | Path, error: OSError) -> InputError:
    """The InputError for a file or folder that cannot be read."""
    if os.path.islink(path) and not os.path.exists(path):
        return InputError(f"{path} cannot be read: it points to nothing; mend or remove the link")
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist: give the place where it is")
    return InputError(f"{path} cannot be read ({error.strerror or error}): see who may read it")


def read_cache(file: Path, res: int, count: int) -> torch.Tensor | None:
    """The pictures in the cache, mapped from the disk, or None unless they are whole."""
    try:
        table = np.memmap(file, np.uint8, "c")  # copy on write: torch wants a tensor that it may write to
        pixels = torch.from_numpy(table).view(-1, 3, res, res)
    except (OSError, ValueError, RuntimeError):  # not there, empty, cut off
        return None
    return pixels if 0.95 * count <= len(pixels) <= count else None

# --- Faces that are drawn: a data set with no download --------------------------------------------

SYNTHETIC = 5000  # how many faces the built-in data set has
SKIN = [(0.96, 0.82, 0.72), (0.89, 0.69, 0.56), (0.78, 0.57, 0.42), (0.58, 0.39, 0.27), (0.38, 0.25, 0.18)]
HAIR = [(0.08, 0.07, 0.07), (0.24, 0.15, 0.10), (0.45, 0.29, 0.16), (0.80, 0.63, 0.36), (0.55, 0.22, 0.12)]
EYES = [(0.25, 0.14, 0.08), (0.40, 0.27, 0.12), (0.33, 0.42, 0.22), (0.30, 0.48, 0.62), (0.42, 0.46, 0.50)]


def synthetic_faces(n: int, res: int, seed: int = 0) -> torch.Tensor:
    """Draw n faces: uint8 (n, 3, res, res), aligned like CelebA's.

    A seed always gives the same ones, but for the rounding of another kind of processor. Head, hair, ears,
    brows, eyes, nose, mouth, neck, shoulders and background vary in colour, shape, pose, light and
    expression. Much of what the hole hides follows from the rest, but not all.
    """
    numbers = torch.rand(n, 64, generator=torch.Generator().manual_seed(seed))
    faces = torch.empty(n, 3, res, res, dtype=torch.uint8)
    fits = max(1, (1 << 18) // res**2)  # so many stay in the processor's cache
    for part in torch.arange(n).split(fits):
        progress(f"drawing faces: {int(part[0])}/{n}")
        faces[part] = draw_faces(numbers[part], res).mul_(255).round_().to(torch.uint8)
    progress(None)
    return faces


def draw_faces(numbers: torch.Tensor, res: int) -> torch.Tensor:
    """A face for each row of uniform numbers in [0, 1), (B, 64) -> (B, 3, res, res) in [0, 1].

    All lengths are in sides of the picture. First the person's traits are drawn at random. What lies in the
    hole depends on them, and on more random numbers.
    """
    columns = iter(numbers[:, :, None, None].unbind(1))  # (B, 1, 1) each

    def vary(low, high):  # in the order of the calls, which decides what the faces look like
        return low + (high - low) * next(columns)

    p = SimpleNamespace()
    p.skin = palette(SKIN, vary(0, 1)) * vary(0.92, 1.06)[:, None]
    p.hair = palette(HAIR, vary(0, 1)) * vary(0.85, 1.1)[:, None]
    p.iris = palette(EYES, vary(0, 1))
    p.turn = vary(-1, 1)
    p.light = vary(-1, 1)
    p.smile = vary(-0.5, 1)
    p.cx = 0.5 + 0.012 * p.turn
    p.eye_y = vary(0.415, 0.437)
    p.eye_dx = vary(0.146, 0.16)
    p.rx = 0.245 * vary(0.92, 1.08)
    p.ry = vary(0.325, 0.355)
    p.cy = vary(0.475, 0.49)
    line = (torch.arange(res) + 0.5) / res
    plane = (line[:, None], line[None, :], 1 / res)  # y, x, the side of a pixel
    canvas = torch.zeros(len(numbers), 3, res, res)
    for draw in (draw_back, draw_head, draw_eyes, draw_nose, draw_mouth):
        draw(canvas, plane, p, vary)
    return canvas.mul_(vary(0.85, 1.08)[:, None]).clamp_(0, 1)


def palette(colours: list, t: torch.Tensor) -> torch.Tensor:
    """t (B, 1, 1) in [0, 1) -> colours (B, 3, 1, 1), mixed between neighbours."""
    table = torch.tensor(colours)
    position = t.view(-1) * (len(colours) - 1)
    low = position.long()
    return torch.lerp(table[low], table[low + 1], (position - low)[:, None])[:, :, None, None]


def ellipse(plane, cx, cy, rx, ry, soft=0.01):
    """Cover (B, H, W): 1 inside, 0 outside, a slope of width `soft` (at least a pixel) between."""
    y, x, pixel = plane
    radius = (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt_()
    return radius.sub_(1).mul_(-ry / max(soft, pixel)).add_(0.5).clamp_(0, 1)


def paint(canvas, cover, colour, strength=1.0):
    """Mix a colour (B or 1, 3, 1 or H, 1 or W) into the canvas (B, 3, H, W) as far as the cover says."""
    canvas.lerp_(colour.expand_as(canvas), (cover * strength)[:, None].expand_as(canvas))


def draw_back(canvas, plane, p, vary):
    """What is behind the face: background, hair, shoulders, neck."""
    y, x, _ = plane
    everywhere = torch.ones(1, 1, 1)
    slope = (y + vary(-0.5, 0.5) * x).clamp(0, 1) * 0.7
    for cover in (everywhere, slope):
        paint(canvas, cover, torch.stack([vary(0.1, 0.95) for _ in range(3)], 1))
    is_long = (vary(0, 1) < 0.4).float()
    full = vary(0.02, 0.075)
    long_hair = ellipse(plane, p.cx, 0.66, p.rx + full + 0.02, vary(0.36, 0.5)) * is_long
    paint(canvas, long_hair, p.hair * 0.8)
    hair = ellipse(plane, p.cx, 0.42, p.rx + full, p.ry + full - 0.02)
    paint(canvas, hair, p.hair)
    clothes = torch.stack([vary(0.05, 0.9) for _ in range(3)], 1)
    shoulders = ellipse(plane, 0.5, 1.14, vary(0.42, 0.56), 0.27)
    paint(canvas, shoulders, clothes)
    neck = ellipse(plane, p.cx, 0.84, 0.13, 0.16)
    paint(canvas, neck, p.skin * 0.8)


def draw_head(canvas, plane, p, vary):
    """Ears, the head lit from one side, and the hair above the forehead."""
    y, x, _ = plane
    for side in (-1, 1):
        ear = ellipse(plane, p.cx + side * p.rx - 0.02 * p.turn, 0.475, 0.034, 0.07)
        paint(canvas, ear, p.skin * (0.8 + 0.1 * side * p.light)[:, None])
    across = (x - p.cx) / p.rx
    down = (y - p.cy) / p.ry
    shade = 1.04 + 0.16 * p.light * across - 0.2 * (across**2 + 0.6 * down**2) * across.abs().clamp(0, 1)
    head = ellipse(plane, p.cx, p.cy, p.rx, p.ry)
    paint(canvas, head, p.skin * shade[:, None])
    face = ellipse(plane, p.cx + vary(-0.07, 0.07), 0.545, p.rx * vary(0.86, 1.0), vary(0.29, 0.345))
    cap = ellipse(plane, p.cx, 0.4, p.rx + 0.02, p.ry - 0.03) * ((0.56 - y) / 0.08).clamp(0, 1)
    paint(canvas, cap * (1 - face), p.hair * (1 + 0.1 * p.light * across)[:, None])


def draw_eyes(canvas, plane, p, vary):
    """Sockets, eyes and brows: their outer halves stick out of the hole."""
    y, x, _ = plane
    opening = vary(0.019, 0.027)
    brow_y = vary(0.06, 0.072)
    thick = vary(0.008, 0.015)
    gaze = 0.012 * vary(-1, 1) + 0.006 * p.turn
    for side in (-1, 1):
        ex = 0.5 + side * p.eye_dx + 0.008 * p.turn
        socket = ellipse(plane, ex, p.eye_y, 0.072, 0.045, 0.04)
        paint(canvas, socket, p.skin * 0.7, 0.55)
        white = ellipse(plane, ex, p.eye_y, 0.052, opening)
        paint(canvas, white, torch.full((1, 3, 1, 1), 0.92))
        iris = ellipse(plane, ex + gaze, p.eye_y, 0.024, 0.024) * white
        paint(canvas, iris, p.iris)
        pupil = ellipse(plane, ex + gaze, p.eye_y, 0.011, 0.011) * white
        paint(canvas, pupil, p.iris * 0.1)
        arch = p.eye_y - brow_y + 4.5 * (x - ex) ** 2 - side * 0.12 * (x - ex)  # the height of the brow at x
        line = ((thick - (y - arch).abs()) * 64 + 0.5).clamp(0, 1)
        brow = ellipse(plane, ex, p.eye_y - brow_y, 0.066, 0.04, 0.02) * line
        paint(canvas, brow, p.hair * 0.65, 0.85)


def draw_nose(canvas, plane, p, vary):
    """A nose of shadows and lights."""
    nose_x = 0.5 + 0.028 * p.turn
    tip = vary(0.55, 0.575)
    wide = vary(0.034, 0.048)
    side_shadow = ellipse(plane, nose_x - 0.02 * p.light - 0.012, 0.5, 0.018, 0.085, 0.03)
    paint(canvas, side_shadow, p.skin * 0.66, 0.5)
    ridge = ellipse(plane, nose_x + 0.008 * p.light, 0.495, 0.012, 0.08, 0.03)
    paint(canvas, ridge, p.skin * 1.22, 0.55)
    under = ellipse(plane, nose_x, tip + 0.012, wide, 0.022, 0.03)
    paint(canvas, under, p.skin * 0.72, 0.7)
    ball = ellipse(plane, nose_x + 0.006 * p.light, tip - 0.004, wide * 0.6, 0.022, 0.03)
    paint(canvas, ball, p.skin * 1.18, 0.6)
    for side in (-1, 1):
        nostril = ellipse(plane, nose_x + side * wide * 0.55, tip + 0.017, 0.01, 0.007)
        paint(canvas, nostril, p.skin * 0.3, 0.85)


def draw_mouth(canvas, plane, p, vary):
    """Two lips around a curve that the smile bends."""
    y, x, _ = plane
    mouth_x = 0.5 + 0.02 * p.turn
    mouth_y = vary(0.655, 0.685)
    half = vary(0.08, 0.095) + 0.014 * p.smile
    off = (x - mouth_x) / half
    middle = y - mouth_y - 0.03 * p.smile * (0.35 - off**2)  # how far below the line between the lips
    taper = (1 - off**2).clamp_(min=0)
    lips = p.skin * torch.tensor([0.94, 0.62, 0.6])[None, :, None, None]
    for centre, thick, light in ((-0.008, 0.014, 0.92), (0.01, 0.016, 1.06), (0.0, 0.004, 0.42)):
        lip = ((thick * taper - (middle - centre * taper).abs()) * 64 + 0.5).clamp(0, 1) * (taper > 0)
        paint(canvas, lip, lips * light)

# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path):
    """Write to a file beside `path` and rename it to `path` at the end: it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process writes to another file
    try:
        with open(aside, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        rename(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def rename(old: Path, new: Path) -> None:
    """Move a file over another. On Windows, a virus scanner or Excel may hold one for a moment: try again."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(old, new)
        time.sleep(0.1)
    os.replace(old, new)


def save(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed into place."""
    with whole_file(Path(path)) as stream:
        stream.write(content)


def free_path(base: str | Path, endings: tuple = ("",)) -> str:
    """base, or base-2, base-3, ...: the first with which no file of these endings is there yet."""
    path = str(base)
    for number in itertools.count(2):
        if not any(os.path.exists(path + ending) for ending in endings):
            return path
        path = f"{base}-{number}"


def png(picture: Image.Image, exif: bytes = b"") -> bytes:
    """A picture, with its EXIF if there is any, as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    return stream.getvalue()


def gif(pictures: list[Image.Image]) -> bytes:
    """A film of the pictures, five a second, the last one shown for two seconds, as the bytes of a GIF."""
    stream = io.BytesIO()
    pause = [200] * (len(pictures) - 1) + [2000]
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=pause, loop=0)
    return stream.getvalue()


def to_csv(rows: list[dict]) -> bytes:
    """Rows with the same keys as the bytes of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_json(value: dict) -> bytes:
    """A dictionary as the bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()

# --- Grids and charts -----------------------------------------------------------------------------


def grid(rows: list[tuple[str, torch.Tensor]], tile: int = 128) -> Image.Image:
    """A table of pictures: each row has a label and images (N, 3, H, W).

    Small pictures are enlarged by a whole number of times, pixel by pixel, to about `tile`. So nothing is
    made smoother than it is.
    """
    font = ImageFont.load_default(15)
    res = rows[0][1].shape[-1]
    side = res * max(1, tile // res)
    gap, margin = 4, 8
    left = max(round(font.getlength(label)) for label, _ in rows) + 2 * margin
    across = max(len(images) for _, images in rows)
    size = (left + across * (side + gap) + gap, len(rows) * (side + gap) + gap)
    sheet = Image.new("RGB", size, "white")
    for row, (label, images) in enumerate(rows):
        top = gap + row * (side + gap)
        ImageDraw.Draw(sheet).text((margin, top + side / 2), label, "black", font, "lm")
        for column, image in enumerate(images):
            picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + gap + column * (side + gap), top))
    return sheet


def beside(sheets: dict[str, Image.Image], height: int = 300) -> Image.Image:
    """Pictures in a row, each under its title, scaled to `height` or, if that is less, to 512 wide."""
    font = ImageFont.load_default(15)
    gap, head = 4, 28
    scaled = {}
    for title, sheet in sheets.items():
        scale = min(512 / sheet.width, height / sheet.height)
        scaled[title] = sheet.resize([max(1, round(side * scale)) for side in sheet.size])
    widths = [max(sheet.width, round(font.getlength(title))) for title, sheet in scaled.items()]
    row = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), head + height + gap), "white")
    left = gap
    for width, (title, sheet) in zip(widths, scaled.items()):
        ImageDraw.Draw(row).text((left + width / 2, head / 2), title, "black", font, "mm")
        row.paste(sheet, (left, head))
        left += width + gap
    return row


COLOURS = ["#1b6ca8", "#d1495b", "#2e933c", "#b8791a", "#6a4c93"]


def chart(x_title: str, curves: dict[str, list[tuple]], width: int = 480, height: int = 300) -> Image.Image:
    """Curves {name: [(x, y), ...]}, or points where one has one pair; the names stand at the right.

    A thin line leads from the last point to its name. Names that would overlap are moved down.
    """
    font = ImageFont.load_default(13)
    left, top, bottom = 58, 10, height - 40
    right = width - 20 - max(round(font.getlength(name)) for name in curves)
    x0, x1 = axis([x for curve in curves.values() for x, _ in curve])
    y0, y1 = axis([y for curve in curves.values() for _, y in curve])

    def at(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text(((left + right) / 2, height - 4), x_title, "#555555", font, "mb")
    for y in ticks(y0, y1):
        pen.line((*at(x0, y), *at(x1, y)), "#dddddd")
        pen.text((left - 6, at(x0, y)[1]), f"{y:.6g}", "#555555", font, "rm")
    for x in ticks(x0, x1):
        pen.text((at(x, y0)[0], bottom + 6), f"{x:.6g}", "#555555", font, "mt")
    lowest_name = -math.inf
    for k, (name, curve) in enumerate(sorted(curves.items(), key=lambda item: -item[1][-1][1])):
        colour = COLOURS[k % len(COLOURS)]
        spots = [at(*point) for point in curve]
        pen.line(spots, colour, 2)
        for x, y in spots[:: max(1, len(spots) // 40)]:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        x, y = spots[-1]
        space_below = 15 * (len(curves) - 1 - k)  # for the names that are still to come
        lowest_name = max(lowest_name + 15, min(y, bottom - space_below))
        pen.line((x + 4, y, right + 8, lowest_name), "#bbbbbb")
        pen.text((right + 10, lowest_name), name, colour, font, "lm")
    return sheet


def axis(values: list[float]) -> tuple[float, float]:
    """The ends of an axis: a little more than the values need."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def ticks(low: float, high: float) -> list[float]:
    """Round values between two ends: multiples of 1, 2 or 5 times a power of ten, four or so."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(power * k for k in (5, 2, 1, 0.5, 0.2) if (high - low) / (power * k) >= 3)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

# --- The screen -----------------------------------------------------------------------------------

screen_line = {"text": "", "time": time.time()}  # the progress line, and when it was written


def say(line: str, screen: str = "stderr") -> None:
    """A line on stderr or stdout, after the progress line is wiped away."""
    progress(None)
    write(line + "\n", screen)


@functools.cache
def say_once(line: str) -> None:
    """The same line only once in a run of the program."""
    say(line)


def progress(line: str | None) -> None:
    """One line on stderr that is written over; None ends it. Without a terminal: a line each 10 seconds."""
    terminal = bool(sys.stderr) and sys.stderr.isatty()
    if line is None:
        if terminal and screen_line["text"]:
            write("\r" + " " * len(screen_line["text"]) + "\r")
        screen_line["text"] = ""
    elif time.time() - screen_line["time"] > (0.2 if terminal else 10):
        if terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            write(f"\r{line:<{len(screen_line['text'])}}")
        else:
            write(line + "\n")
        screen_line.update(text=line, time=time.time())


def write(text: str, screen: str = "stderr") -> None:
    """Write to a screen. One that was closed, or a pipe that nobody reads, ends nothing: it is let go."""
    if getattr(sys, screen):
        try:
            print(text, end="", file=getattr(sys, screen), flush=True)
        except (OSError, ValueError):
            setattr(sys, screen, None)


def time_left(remaining: float, speed: float) -> str:
    """', 3 min 20 s left' for the progress line."""
    minutes, seconds = divmod(round(remaining / speed), 60)
    return f", {minutes} min {seconds:02d} s left" if minutes else f", {seconds} s left"
