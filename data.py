"""File 1 of 4, data.py: all that reads, damages or draws pictures (paper, section 2.1, figures 1 and 4).

What you learn here: how a hole is cut; how a folder or zip of photographs becomes one tensor of bytes; how a
batch is taken from it; how to draw a face with nothing but ellipses.

    pixels  uint8 (N, 3, res, res)    on disk and in the data set, because a byte is enough
    image   float (B, 3, res, res)    in [0, 1], everywhere else
    mask    float (B, 1, res, res)    1 in the hole, 0 where the picture is known

Try it:  python -c "import data; data.grid([('faces', data.synthetic_faces(8, 64, 0))]).save('faces.png')"
"""

import collections
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

# --- The hole -------------------------------------------------------------------------------------


def center_box(res: int, fraction: float) -> torch.Tensor:
    """The paper's hole as (1, 4) whole numbers: top, left, bottom, right, the last two just outside.

    side = round(res * fraction), corner = (res - side) // 2: 19 pixels from pixel 22 on for 64 and 0.3.
    """
    side = round(res * fraction)
    corner = (res - side) // 2
    return torch.tensor([[corner, corner, corner + side, corner + side]])


def random_boxes(n: int, res: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """(n, 4) holes for training: half of them the paper's, the others rectangles of any place.

    The sides of those are drawn evenly from half to one and a half times the paper's.
    """
    low, high = max(1, round(res * fraction / 2)), min(res - 1, round(res * fraction * 1.5))
    size = torch.randint(low, high + 1, (n, 2), generator=generator)
    corner = (torch.rand(n, 2, generator=generator) * (res - size + 1)).long()
    central = torch.rand(n, 1, generator=generator) < 0.5
    return torch.where(central, center_box(res, fraction), torch.cat([corner, corner + size], 1))


def box_mask(boxes: torch.Tensor, res: int) -> torch.Tensor:
    """Boxes (B, 4) -> mask (B, 1, res, res), 1 in the hole."""
    line = torch.arange(res, device=boxes.device)
    top, left, bottom, right = (edge[:, None] for edge in boxes.unbind(1))
    rows, columns = (line >= top) & (line < bottom), (line >= left) & (line < right)  # (B, res) each
    return (rows[:, None, :, None] & columns[:, None, None, :]).float()


def center_hole(res: int, fraction: float) -> torch.Tensor:
    """The paper's hole as a mask (1, 1, res, res): a centred square, `fraction` of the side (section 2.1)."""
    return box_mask(center_box(res, fraction), res)


def damage(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """White where the mask is 1 (section 2.1, figure 1): image (B, 3, H, W) in [0, 1] -> the same shape."""
    return image * (1 - mask) + mask


def paste(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The output in the hole, the image elsewhere: the restored picture, which a user keeps."""
    return output * mask + image * (1 - mask)


# --- One picture: a file becomes pixels -----------------------------------------------------------

PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif",
)  # fmt: skip
LARGEST_FILE = 1 << 28  # a picture file of more than 256 MB is a mistake or an attack
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns, open_photo refuses
# A PNG with a long comment is a picture too.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = LARGEST_FILE
SIGNATURE = "inpaint.py"  # stands in every picture that this program writes: its outputs are never its data


class InputError(Exception):
    """A mistake of the user, told in one line: what was wrong, where, what to do about it."""


class Broken(InputError):
    """A file that was read and holds no picture. (One that cannot be read is an OSError: it may be good.)"""


def open_photo(content: bytes, shortest: int | None = None, behind: str = "white") -> Image.Image:
    """The bytes of a picture file -> upright RGB picture, its first frame, transparency laid on the colour
    `behind`.

    With `shortest`, a JPEG that is at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size: its 8
    x 8 blocks of frequencies can be read as 4 x 4, which saves most of the work. Broken if it is no
    picture.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        width, height = picture.size
        if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
            raise Broken(f"{width} x {height} pixels: more than Pillow's limit against decompression bombs")
        if shortest and min(width, height) >= 2 * shortest:
            scale = shortest / min(width, height)
            picture.draft(None, (int(width * scale), int(height * scale)))
        picture.load()
    except Broken:
        raise
    except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error, ...
        why = str(error).partition(" <")[0] or type(error).__name__  # what follows is an address in memory
        raise Broken(f"not a picture that can be read ({why})") from error
    with contextlib.suppress(Exception):  # an orientation that cannot be read does not cost the picture
        ImageOps.exif_transpose(picture, in_place=True)
    return to_rgb(picture, behind)


def read_photo(file: Path, behind: str = "white") -> Image.Image:
    """open_photo of a file; InputError if it cannot be read."""
    try:
        return open_photo(read_file(file), behind=behind)
    except FileNotFoundError:
        raise InputError("does not exist") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error


def read_file(file: Path) -> bytes:
    """The content of a file; Broken if it is too large."""
    if file.stat().st_size > LARGEST_FILE:
        raise Broken(f"larger than {LARGEST_FILE >> 20} MB")
    return file.read_bytes()


def to_rgb(picture: Image.Image, behind: str) -> Image.Image:
    """Any mode -> 8-bit RGB. 16-bit, 32-bit and float pictures are scaled, where Pillow would clip them."""
    if picture.has_transparency_data and picture.mode[0] not in "IF":
        background = Image.new("RGBA", picture.size, behind)
        flat = Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
        flat.info["icc_profile"] = picture.info.get("icc_profile")  # what its colours mean on a screen
        return flat
    if picture.mode[0] not in "IF":
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture).astype(np.float32), posinf=0, neginf=0)
    top = max(1.0 if picture.mode == "F" else 65535.0, float(values.max()))
    return Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8)).convert("RGB")


def central_square(picture: Image.Image, res: int) -> Image.Image:
    """The largest centred square, scaled to res x res with a Lanczos filter."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((res, res), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def is_ours(content: bytes) -> bool:
    """Whether this program wrote a picture file."""
    with contextlib.suppress(Exception):  # what cannot be opened is not ours
        info = Image.open(io.BytesIO(content)).info
        return SIGNATURE in (info.get("Software"), info.get("comment", b"").decode(errors="replace"))
    return False


# --- A data set: a folder or zip becomes one tensor -----------------------------------------------


def list_pictures(path: Path) -> tuple[list[tuple], collections.Counter]:
    """(name, size, time or checksum) of every picture in a folder or zip, sorted by name; the kinds passed
    over.

    Folders are searched to the bottom, linked ones too. Hidden files and folders and the __MACOSX litter of
    some zips do not count at all.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: it takes a folder of pictures or a .zip")
    try:
        files = walk(path) if path.is_dir() else members(path)
    except OSError as error:
        raise InputError(f"{path} cannot be searched ({error}): see who may read it") from error
    visible = [file for file in files if not any(hidden(part) for part in file[0].split("/"))]
    found = sorted(file for file in visible if file[0].lower().endswith(PICTURES))
    passed = collections.Counter(
        Path(name).suffix.lower() or "no suffix" for name, *_ in set(visible) - set(found)
    )
    if not found:
        kinds = f"; it holds {in_words(passed)}" if passed else ""
        raise InputError(f"{path} holds no picture ({' '.join(PICTURES)}){kinds}")
    return found, passed


def hidden(part: str) -> bool:
    """True for hidden files and folders, and for what macOS adds to a zip."""
    return part == "__MACOSX" or part.startswith(".") and part != "."


def walk(path: Path) -> list[tuple]:
    """(name, size, time) of every file below a folder; links are followed, and no folder is entered twice."""
    files, seen = [], set()

    def fail(error):
        raise error

    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [name for name in sorted(folders) if real not in seen and not hidden(name)]
        for name in names if real not in seen else ():
            if hidden(name):
                continue
            file = Path(folder, name)
            is_picture = file.suffix.lower() in PICTURES
            status = file.stat(follow_symlinks=is_picture)  # another kind's link may lead to nothing
            files.append((file.relative_to(path).as_posix(), status.st_size, status.st_mtime_ns))
        seen.add(real)
    return files


def members(path: Path) -> list[tuple]:
    """(name, size, checksum) of every file in a zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if not info.is_dir()]
    except OSError:
        raise
    except Exception as error:  # a damaged directory can raise more than BadZipFile
        raise InputError(
            f"{path} is no zip, or is cut off ({error}): it takes a folder or a whole .zip"
        ) from error
    if any(info.flag_bits & 1 for info in found):
        raise InputError(f"{path} is protected by a password: unpack it and give the folder")
    return [(info.filename, info.file_size, info.CRC) for info in found]


def in_words(kinds: collections.Counter) -> str:
    """'3 .heic, 1 no suffix'."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))


@functools.lru_cache(maxsize=1)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """The zip, kept open; each process needs its own, because a file has one place where it is read."""
    return zipfile.ZipFile(path)


def decode(path: Path, name: str, res: int) -> np.ndarray:
    """One picture of a folder or zip -> uint8 (3, res, res). Broken if it is no picture, OSError if it is
    not read."""
    if path.is_dir():
        content = read_file(path / name)
    else:
        archive = open_zip(path, os.getpid())
        if archive.getinfo(name).file_size > LARGEST_FILE:
            raise Broken(f"larger than {LARGEST_FILE >> 20} MB")
        try:
            content = archive.read(name)
        except OSError:
            raise
        except Exception as error:  # BadZipFile, zlib.error, NotImplementedError, ...
            raise Broken(f"cannot be unpacked ({error})") from error
    if name.lower().endswith((".png", ".gif")) and is_ours(content):
        raise Broken(SIGNATURE)
    return to_tensor(central_square(open_photo(content, res), res)).numpy()


def decode_part(path: Path, res: int, names: list[str]) -> list:
    """Each picture's pixels, or the exception in their place: one broken picture must not end the others."""
    found = []
    for name in names:
        try:
            found.append(decode(path, name, res))
        except (Broken, OSError) as error:
            found.append(error)
    return found


def decode_all(path: Path, found: list[tuple], res: int):
    """Yield the pixels of every picture, or an exception, in order; on all cores where processes can be
    forked."""
    names, work = [name for name, *_ in found], functools.partial(decode_part, path, res)
    workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if multiprocessing.current_process().daemon or sum(size for _, size, _ in found) < 1 << 23:
        workers = 1  # a daemon may have no children, and for 8 MB they do not pay

    own = torch.Generator()  # the caller's random numbers stay as they are

    def start(count):
        return iter(torch.utils.data.DataLoader(names, 64, num_workers=count, collate_fn=work, generator=own))

    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of fork beside torch's threads.
            warnings.simplefilter("ignore", DeprecationWarning)
            parts = start(workers if workers > 1 else 0)
    except OSError:  # this host starts no more processes
        parts = start(0)
    try:
        for part in parts:
            yield from part
    except RuntimeError as error:
        raise InputError(f"a process that reads {path} was ended from outside: start again") from error
    finally:
        open_zip.cache_clear()


def load_images(path: str | Path, res: int, cache: str | Path = "cache") -> torch.Tensor:
    """A folder (searched to the bottom) or a .zip of pictures -> uint8 (N, 3, res, res), sorted by name.

    Each picture is turned upright, made RGB, cut to its central square and scaled. This is done once; the
    result is kept in `cache` as a .npy file, from where it is mapped into memory. The file's name holds a
    checksum of the pictures' names, sizes and times, so changed pictures are read anew. Up to 5 % broken
    pictures are left out, and the first ten of them named each time; InputError if more are, if one cannot
    be read, or if there is none.
    """
    path = Path(path)
    found, passed = list_pictures(path)
    place = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]
    key = hashlib.sha256(json.dumps(["square, Lanczos, on white", res, found]).encode()).hexdigest()[:16]
    file = Path(cache, f"{path.stem}-{place}-{res}-{key}.npy")
    if passed:
        say(f"{path}: {passed.total()} files of other kinds are passed over ({in_words(passed)})")
    loaded = read_cache(file)
    if loaded is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for old in file.parent.glob(f"{glob.escape(path.stem)}-{place}-{res}-*.*"):
                with contextlib.suppress(OSError):
                    if old.stem != file.stem:  # another run may be making the same one now
                        old.unlink()
            fill_cache(file, path, found, res)
            loaded = read_cache(file)
            if loaded is None:
                raise FileNotFoundError(f"{file} was changed while it was read")
        except OSError as error:
            say(f"warning: no cache can be kept in {file.parent} ({error}): reading for this run only")
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # its mapping outlives it
                fill_cache(Path(folder, "cache.npy"), path, found, res)
                loaded = read_cache(Path(folder, "cache.npy"))
    pixels, left_out = loaded
    report_left_out(path, left_out, len(found))
    return pixels


def read_cache(file: Path) -> tuple[torch.Tensor, list] | None:
    """(pixels, mapped from the disk; [name, reason] of those left out), or None unless the file is whole."""
    try:
        left_out = json.loads(file.with_suffix(".json").read_text())
        table = np.load(file, mmap_mode="c")  # copy on write: torch wants a tensor that it may write to
        return torch.from_numpy(table)[: len(table) - len(left_out)], left_out
    except Exception:  # missing or damaged, which can raise anything
        return None


def fill_cache(file: Path, path: Path, found: list[tuple], res: int) -> None:
    """Decode into a file beside `file`, then move it into place. Rows of pictures left out are empty, at
    the end."""
    left_out, began = [], time.time()
    with whole_file(file) as stream, contextlib.closing(decode_all(path, found, res)) as decoded:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(found), 3, res, res)}
        np.lib.format.write_array_header_1_0(stream, header)
        for done, pixels in enumerate(decoded, 1):
            name = found[done - 1][0]
            if isinstance(pixels, Broken):
                left_out.append([name, str(pixels)])
            elif isinstance(pixels, OSError):
                raise InputError(
                    f"{path}: {name} cannot be read ({pixels.strerror or pixels}): see who may read it"
                )
            else:
                stream.write(pixels.tobytes())
            rate = done / (time.time() - began + 1e-9)
            progress(f"reading {path.name}: {done}/{len(found)} pictures{time_left(len(found) - done, rate)}")
        progress(None)
        report_left_out(path, left_out, len(found), named=False)
        stream.write(bytes(3 * res * res * len(left_out)))
        save(file.with_suffix(".json"), json.dumps(left_out).encode())


def report_left_out(path: Path, left_out: list, total: int, named: bool = True) -> None:
    """Name the first ten broken pictures on stderr; InputError if they are too many to be an accident."""
    broken = [f"{name}: {reason}" for name, reason in left_out if reason != SIGNATURE]
    ours = len(left_out) - len(broken)
    if len(broken) > 0.05 * (total - ours):
        raise InputError(f"{path}: {len(broken)} of {total} pictures are broken, the first are"
                         f" {'; '.join(broken[:5])}: mend or remove them")  # fmt: skip
    if ours == total:
        raise InputError(f"{path} holds only pictures that this program wrote: give another folder")
    if named and ours:
        say(f"{path}: {ours} pictures that this program wrote are passed over")
    if named and broken:
        say(
            "\n  ".join([f"{path}: {len(broken)} of {total} pictures are broken and left out:", *broken[:10]])
        )


def split(pixels: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part): the first and the last by name (section 2.5: 80 % and 20 %).

    By order and not at random: for all of CelebA this is nearly the official partition, in which nobody is on
    both sides.
    """
    cut = len(pixels) - round(len(pixels) * share)
    return pixels[:cut], pixels[cut:]


def fingerprint(pixels: torch.Tensor) -> torch.Tensor:
    """What each picture looks like from afar, (N, 12): the mean colour of its four quarters, 0 to 255.

    The same picture has nearly the same 12 numbers everywhere. They are not quite equal, because another
    processor decodes or draws some pixels a little differently.
    """
    half = pixels.shape[2] // 2
    quarters = [torch.nn.functional.avg_pool2d(part.float(), half) for part in pixels.split(100)]
    return torch.cat(quarters).flatten(1)


# --- Batches --------------------------------------------------------------------------------------


def settle(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Put the training set on the GPU if it takes under half of the free memory; else it stays where it
    is."""
    fits = device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels


def batches(training: torch.Tensor, size: int, order: torch.Tensor, flip: torch.Tensor, device: torch.device):
    """Yield the batches of an epoch: image (size, 3, H, W), float in [0, 1], on `device`.

    `order` (steps * size) says which pictures, `flip` (steps * size) which of them are mirrored. There is no
    DataLoader: to pick rows of one tensor takes no time that could be hidden.
    """
    order, flip = order.to(training.device), flip.to(device)
    for start in range(0, len(order), size):
        pixels = training[order[start : start + size]]
        if device.type == "cuda" and not training.is_cuda:
            pixels = pixels.pin_memory()  # so that the copy need not wait for the device
        pixels = pixels.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        image = pixels.float().div_(255)
        yield torch.where(flip[start : start + size, None, None, None], image.flip(3), image)


# --- Faces that are drawn: a data set with no download --------------------------------------------

SYNTHETIC = 5000  # how many faces the built-in data set has
SKIN = [(0.96, 0.82, 0.72), (0.89, 0.69, 0.56), (0.78, 0.57, 0.42), (0.58, 0.39, 0.27), (0.38, 0.25, 0.18)]
HAIR = [(0.08, 0.07, 0.07), (0.24, 0.15, 0.10), (0.45, 0.29, 0.16), (0.80, 0.63, 0.36), (0.55, 0.22, 0.12)]
EYES = [(0.25, 0.14, 0.08), (0.40, 0.27, 0.12), (0.33, 0.42, 0.22), (0.30, 0.48, 0.62), (0.42, 0.46, 0.50)]


def palette(colours: list, t: torch.Tensor) -> torch.Tensor:
    """t (B, 1, 1) in [0, 1) -> colours (B, 3, 1, 1), mixed between neighbours."""
    table, place = torch.tensor(colours), t.view(-1) * (len(colours) - 1)
    low = place.long()
    return torch.lerp(table[low], table[low + 1], (place - low)[:, None])[:, :, None, None]


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
    for cover in (torch.ones(1, 1, 1), (y + vary(-0.5, 0.5) * x).clamp(0, 1) * 0.7):
        paint(canvas, cover, torch.stack([vary(0.1, 0.95) for _ in range(3)], 1))
    long, full = (vary(0, 1) < 0.4).float(), vary(0.02, 0.075)
    paint(canvas, ellipse(plane, p.cx, 0.66, p.rx + full + 0.02, vary(0.36, 0.5)) * long, p.hair * 0.8)
    paint(canvas, ellipse(plane, p.cx, 0.42, p.rx + full, p.ry + full - 0.02), p.hair)
    clothes = torch.stack([vary(0.05, 0.9) for _ in range(3)], 1)
    paint(canvas, ellipse(plane, 0.5, 1.14, vary(0.42, 0.56), 0.27), clothes)
    paint(canvas, ellipse(plane, p.cx, 0.84, 0.13, 0.16), p.skin * 0.8)


def draw_head(canvas, plane, p, vary):
    """Ears, the head lit from one side, and the hair above the forehead."""
    y, x, _ = plane
    for side in (-1, 1):
        ear = ellipse(plane, p.cx + side * p.rx - 0.02 * p.turn, 0.475, 0.034, 0.07)
        paint(canvas, ear, p.skin * (0.8 + 0.1 * side * p.light)[:, None])
    across, down = (x - p.cx) / p.rx, (y - p.cy) / p.ry
    shade = 1.04 + 0.16 * p.light * across - 0.2 * (across**2 + 0.6 * down**2) * across.abs().clamp(0, 1)
    paint(canvas, ellipse(plane, p.cx, p.cy, p.rx, p.ry), p.skin * shade[:, None])
    face = ellipse(plane, p.cx + vary(-0.07, 0.07), 0.545, p.rx * vary(0.86, 1.0), vary(0.29, 0.345))
    cap = ellipse(plane, p.cx, 0.4, p.rx + 0.02, p.ry - 0.03) * ((0.56 - y) / 0.08).clamp(0, 1)
    paint(canvas, cap * (1 - face), p.hair * (1 + 0.1 * p.light * across)[:, None])


def draw_eyes(canvas, plane, p, vary):
    """Sockets, eyes and brows: their outer halves stick out of the hole."""
    y, x, _ = plane
    opening, brow_y, thick = vary(0.019, 0.027), vary(0.06, 0.072), vary(0.008, 0.015)
    gaze = 0.012 * vary(-1, 1) + 0.006 * p.turn
    for side in (-1, 1):
        ex, ey = 0.5 + side * p.eye_dx + 0.008 * p.turn, p.eye_y
        paint(canvas, ellipse(plane, ex, ey, 0.072, 0.045, 0.04), p.skin * 0.7, 0.55)
        white = ellipse(plane, ex, ey, 0.052, opening)
        paint(canvas, white, torch.full((1, 3, 1, 1), 0.92))
        paint(canvas, ellipse(plane, ex + gaze, ey, 0.024, 0.024) * white, p.iris)
        paint(canvas, ellipse(plane, ex + gaze, ey, 0.011, 0.011) * white, p.iris * 0.1)
        arch = ey - brow_y + 4.5 * (x - ex) ** 2 - side * 0.12 * (x - ex)  # the height of the brow at x
        line = ((thick - (y - arch).abs()) * 64 + 0.5).clamp(0, 1)
        brow = ellipse(plane, ex, ey - brow_y, 0.066, 0.04, 0.02) * line
        paint(canvas, brow, p.hair * 0.65, 0.85)


def draw_nose_and_mouth(canvas, plane, p, vary):
    """A nose of shadows and lights, and two lips around a curve that the smile bends."""
    y, x, _ = plane
    nose_x, tip, wide = 0.5 + 0.028 * p.turn, vary(0.55, 0.575), vary(0.034, 0.048)
    paint(
        canvas, ellipse(plane, nose_x - 0.02 * p.light - 0.012, 0.5, 0.018, 0.085, 0.03), p.skin * 0.66, 0.5
    )
    paint(canvas, ellipse(plane, nose_x + 0.008 * p.light, 0.495, 0.012, 0.08, 0.03), p.skin * 1.22, 0.55)
    paint(canvas, ellipse(plane, nose_x, tip + 0.012, wide, 0.022, 0.03), p.skin * 0.72, 0.7)
    paint(
        canvas,
        ellipse(plane, nose_x + 0.006 * p.light, tip - 0.004, wide * 0.6, 0.022, 0.03),
        p.skin * 1.18,
        0.6,
    )
    for side in (-1, 1):
        paint(
            canvas, ellipse(plane, nose_x + side * wide * 0.55, tip + 0.017, 0.01, 0.007), p.skin * 0.3, 0.85
        )
    mouth_x, mouth_y, half = 0.5 + 0.02 * p.turn, vary(0.655, 0.685), vary(0.08, 0.095) + 0.014 * p.smile
    off = (x - mouth_x) / half
    middle = y - mouth_y - 0.03 * p.smile * (0.35 - off**2)  # how far below the line between the lips
    taper, lips = (1 - off**2).clamp_(min=0), p.skin * torch.tensor([0.94, 0.62, 0.6])[None, :, None, None]
    for centre, thick, light in ((-0.008, 0.014, 0.92), (0.01, 0.016, 1.06), (0.0, 0.004, 0.42)):
        lip = ((thick * taper - (middle - centre * taper).abs()) * 64 + 0.5).clamp(0, 1) * (taper > 0)
        paint(canvas, lip, lips * light)


def draw_faces(random: torch.Tensor, res: int) -> torch.Tensor:
    """A face for each row of random numbers (B, 64) -> (B, 3, res, res) in [0, 1]; all lengths in sides of
    the picture.

    First the person's traits are drawn at random. What lies in the hole depends on them, and on more random
    numbers.
    """
    numbers = iter(random[:, :, None, None].unbind(1))  # (B, 1, 1) each

    def vary(low, high):
        return low + (high - low) * next(numbers)

    p = SimpleNamespace(skin=palette(SKIN, vary(0, 1)) * vary(0.92, 1.06)[:, None])
    p.hair, p.iris = palette(HAIR, vary(0, 1)) * vary(0.85, 1.1)[:, None], palette(EYES, vary(0, 1))
    p.turn, p.light, p.smile = vary(-1, 1), vary(-1, 1), vary(-0.5, 1)
    p.cx, p.eye_y, p.eye_dx = 0.5 + 0.012 * p.turn, vary(0.415, 0.437), vary(0.146, 0.16)
    p.rx, p.ry, p.cy = 0.245 * vary(0.92, 1.08), vary(0.325, 0.355), vary(0.475, 0.49)
    line = (torch.arange(res) + 0.5) / res
    plane, canvas = (line[:, None], line[None, :], 1 / res), torch.zeros(len(random), 3, res, res)
    for draw in (draw_back, draw_head, draw_eyes, draw_nose_and_mouth):
        draw(canvas, plane, p, vary)
    return canvas.mul_(vary(0.85, 1.08)[:, None]).clamp_(0, 1)


def synthetic_faces(n: int, res: int, seed: int = 0) -> torch.Tensor:
    """Draw n faces: uint8 (n, 3, res, res), aligned like CelebA's. A seed always gives the same ones, but for
    the rounding of another kind of processor.

    Head, hair, ears, brows, eyes, nose, mouth, neck, shoulders and background vary in colour, shape, pose,
    light and expression. Much of what the hole hides follows from the rest, but not all.
    """
    numbers = torch.rand(n, 64, generator=torch.Generator().manual_seed(seed))
    faces = torch.empty(n, 3, res, res, dtype=torch.uint8)
    fits = max(1, (1 << 18) // res**2)  # so many stay in the processor's cache
    for part in torch.arange(n).split(fits):
        progress(f"drawing faces: {int(part[0])}/{n}")
        faces[part] = draw_faces(numbers[part], res).mul_(255).round_().to(torch.uint8)
    progress(None)
    return faces


# --- Writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path):
    """Write to a file beside `path` and rename it to `path` at the end: it is there whole or not at all."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # left by a run that was killed
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:  # a living one writes to its own all the time
                old.unlink()
    # Two runs, perhaps on two machines, must not write to one file.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(aside, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def save(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed into place."""
    with whole_file(Path(path)) as stream:
        stream.write(content)


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, signed as this program's."""
    stream, note = io.BytesIO(), PngImagePlugin.PngInfo()
    note.add_text("Software", SIGNATURE)
    picture.save(stream, "PNG", pnginfo=note)
    return stream.getvalue()


def gif(frames: list[Image.Image]) -> bytes:
    """A film of the frames, five a second, the last one shown for two seconds; signed as this program's."""
    stream, pause = io.BytesIO(), [200] * (len(frames) - 1) + [2000]
    frames[0].save(
        stream, "GIF", save_all=True, append_images=frames[1:], duration=pause, loop=0, comment=SIGNATURE
    )
    return stream.getvalue()


def say(line: str) -> None:
    """A line on stderr, if there is one."""
    progress(None)
    if sys.stderr:
        print(line, file=sys.stderr, flush=True)


_shown = ["", time.time()]  # the progress line on the screen, and when one was last written


def progress(line: str | None) -> None:
    """One line on stderr that is written over; None ends it. Without a terminal: a plain line each 10
    seconds."""
    terminal = hasattr(sys.stderr, "isatty") and sys.stderr.isatty()
    if line is None:
        if terminal and _shown[0]:
            print("\r" + " " * len(_shown[0]) + "\r", end="", file=sys.stderr, flush=True)
        _shown[0] = ""
    elif sys.stderr and time.time() - _shown[1] > (0.2 if terminal else 10):
        line = line[: shutil.get_terminal_size().columns - 1] if terminal else line
        text, end = (f"\r{line:<{len(_shown[0])}}", "") if terminal else (line, "\n")
        print(text, end=end, file=sys.stderr, flush=True)
        _shown[:] = line, time.time()


def time_left(remaining: float, rate: float) -> str:
    """', 3 min 20 s left' for the progress line."""
    minutes, seconds = divmod(round(remaining / rate), 60)
    return f", {minutes} min {seconds:02d} s left" if minutes else f", {seconds} s left"


# --- Drawing: grids and charts --------------------------------------------------------------------


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W), uint8 or float in [0, 1] -> RGB picture."""
    if image.is_floating_point():
        image = image.float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def grid(strips: list[tuple[str, torch.Tensor]], upright: bool = False, tile: int = 128) -> Image.Image:
    """A labelled table of pictures: each strip (label, images (N, 3, H, W)) is a row, or a column if
    `upright`.

    Small pictures are enlarged by a whole number of times, pixel by pixel, to about `tile`: nothing is
    smoothed.
    """
    font = ImageFont.load_default(15)
    size, count = strips[0][1].shape[-1], max(len(images) for _, images in strips)
    side, gap, margin = size * max(1, tile // size), 4, 8
    lines = 1 + max(label.count("\n") for label, _ in strips)
    label_w = 0 if upright else max(round(font.getlength(label)) for label, _ in strips) + 2 * margin
    label_h = 20 * lines + margin if upright else 0
    across, down = (len(strips), count) if upright else (count, len(strips))
    sheet = Image.new(
        "RGB", (label_w + across * (side + gap) + gap, label_h + down * (side + gap) + gap), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for s, (label, images) in enumerate(strips):
        middle = gap + (s + 0.5) * (side + gap)
        if upright:
            pen.text((middle, label_h / 2), label, "black", font, "mm", align="center")
        else:
            pen.text((margin, middle), label, "black", font, "lm")
        for k, image in enumerate(images):
            column, row = (s, k) if upright else (k, s)
            picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (label_w + gap + column * (side + gap), label_h + gap + row * (side + gap)))
    return sheet


def side_by_side(parts: dict[str, Image.Image], height: int = 384) -> Image.Image:
    """Labelled pictures of any size beside each other, each scaled to `height` or, if that is less, to 512
    wide."""
    font, left, thumbs = ImageFont.load_default(15), 4, {}
    for label, picture in parts.items():
        scale = min(512 / picture.width, height / picture.height)
        thumbs[label] = picture.resize(tuple(max(1, round(side * scale)) for side in picture.size))
    sheet = Image.new("RGB", (4 + sum(max(t.width, 80) + 4 for t in thumbs.values()), height + 32), "white")
    for label, thumb in thumbs.items():
        ImageDraw.Draw(sheet).text((left + max(thumb.width, 80) / 2, 14), label, "black", font, "mm")
        sheet.paste(thumb, (left, 28))
        left += max(thumb.width, 80) + 4
    return sheet


def beside(sheets: list[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    row = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
    for k, sheet in enumerate(sheets):
        row.paste(sheet, (sum(before.width for before in sheets[:k]), 0))
    return row


COLOURS = ["#1b6ca8", "#d1495b", "#2e933c", "#b8791a", "#6a4c93"]


def chart(
    title: str, x_title: str, series: dict[str, list[tuple]], width: int = 480, height: int = 300
) -> Image.Image:
    """Curves {name: [(x, y), ...]}, or points where a series has one; the names stand at the right.

    A thin line leads from the last point to its name. Names that would overlap are moved down. What is not
    finite is left out.
    """
    font, left, top, bottom = ImageFont.load_default(13), 58, 34, height - 40
    right = width - 20 - max(round(font.getlength(name)) for name in series)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    series = {
        name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points} or {"": [(0.0, 0.0)]}
    (x0, x1), (y0, y1) = (
        axis(values) for values in zip(*(point for points in series.values() for point in points))
    )

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    pen.text((left, 6), title, "black", ImageFont.load_default(15))
    pen.text(((left + right) / 2, height - 4), x_title, "#555555", font, "mb")
    for y in ticks(y0, y1):
        pen.line((*place(x0, y), *place(x1, y)), "#dddddd")
        pen.text((left - 6, place(x0, y)[1]), f"{y:.6g}", "#555555", font, "rm")
    for x in ticks(x0, x1):
        pen.text((place(x, y0)[0], bottom + 6), f"{x:.6g}", "#555555", font, "mt")
    taken = -math.inf
    for k, (name, points) in enumerate(sorted(series.items(), key=lambda item: -item[1][-1][1])):
        colour, spots = COLOURS[k % len(COLOURS)], [place(*point) for point in points]
        pen.line(spots, colour, 2)
        for x, y in spots[:: max(1, len(spots) // 40)]:
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), colour)
        x, y = spots[-1]
        taken = max(taken + 15, min(y, bottom - 15 * (len(series) - 1 - k)))
        pen.line((x + 4, y, right + 8, taken), "#bbbbbb")
        pen.text((right + 10, taken), name, colour, font, "lm")
    return sheet


def axis(values: tuple) -> tuple[float, float]:
    """The ends of an axis: a little more than the values need."""
    low, high = min(values), max(values)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def ticks(low: float, high: float) -> list[float]:
    """Round values between two ends: multiples of 1, 2 or 5 times a power of ten, four or so."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(power * k for k in (5, 2, 1, 0.5, 0.2) if (high - low) / (power * k) >= 3)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
