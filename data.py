"""Chapter 1, data.py: everything that reads, damages or draws pictures (paper, section 2.1 and figures 1 and 4).

What you learn here: how a folder or zip of photographs becomes one tensor of bytes; how a hole
is cut; how a batch is taken without a DataLoader; how to draw a face with nothing but ellipses.

    pixels  uint8 (N, 3, res, res)    on disk and in the data set, because a byte is enough
    images  float (B, 3, res, res)    in [0, 1], everywhere else
    mask    float (B, 1, res, res)    1 in the hole, 0 where the picture is known

Try it:  python -c "import data; data.grid([('faces', data.synthetic_faces(8, 64, 0))]).save('faces.png')"
"""

import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

PICTURES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif",
)  # fmt: skip
RECIPE = "central square, Lanczos, version 1"  # part of the cache's key: change it when the decoding changes
LARGEST_FILE = 1 << 28  # a picture file of more than 256 MB is a mistake or an attack
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns, open_photo refuses
SYNTHETIC = 5000  # how many faces the built-in data set has


class InputError(Exception):
    """A mistake of the user, told in one line: what was wrong, where, what to do about it."""


# --- The hole -------------------------------------------------------------------------------------


def center_box(res: int, fraction: float) -> torch.Tensor:
    """The paper's hole as (1, 4) whole numbers: top, left, bottom, right, the last two just outside.

    side = round(res * fraction), corner = (res - side) // 2: 19 pixels from pixel 22 on for 64 and 0.3.
    """
    side = round(res * fraction)
    corner = (res - side) // 2
    return torch.tensor([[corner, corner, corner + side, corner + side]])


def random_boxes(n: int, res: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
    """(n, 4) holes for training: half of them the paper's, the others of any place, size and shape.

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


def damage(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """White where the mask is 1 (section 2.1, figure 1): images (B, 3, H, W) in [0, 1] -> the same shape."""
    return images * (1 - mask) + mask


# --- One picture: a file becomes pixels -----------------------------------------------------------


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> 8-bit RGB. 16-bit, 32-bit and float pictures are scaled, where Pillow would clip them."""
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # straight to RGB, Pillow would warn
    if picture.mode[0] not in "IF":
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    values = np.nan_to_num(np.asarray(picture).astype(np.float32))
    top = max(1.0 if picture.mode == "F" else 65535.0, float(values.max()))
    grey = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    return grey.convert("RGB")


def open_photo(file, shortest: int | None = None) -> Image.Image:
    """A picture file (path or stream) -> upright RGB picture, its first frame; transparency is dropped.

    With `shortest`, a JPEG that is at least twice as large is decoded at 1/2, 1/4 or 1/8 of its size:
    its 8 x 8 blocks of frequencies can be read as 4 x 4, which saves most of the work. Whatever is wrong
    with the file is an InputError.
    """
    try:
        picture = Image.open(file)
        width, height = picture.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise InputError(f"{width} x {height} pixels: more than Pillow's limit against decompression bombs")
        if shortest and min(width, height) >= 2 * shortest:
            scale = shortest / min(width, height)
            picture.draft(None, (int(width * scale), int(height * scale)))
        ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError("does not exist") from None
    except Exception as error:  # a broken file can raise anything: OSError, SyntaxError, struct.error, ...
        raise InputError(f"not a picture that can be read ({str(error) or type(error).__name__})") from error


def central_square(picture: Image.Image, res: int) -> Image.Image:
    """The largest centred square, scaled to res x res with a Lanczos filter."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side)).resize((res, res), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


# --- A data set: a folder or zip becomes one tensor -----------------------------------------------


def list_pictures(path: Path) -> list[tuple]:
    """(name, size, time or checksum) of every picture in a folder or zip, to the bottom, sorted by name.

    Other files, hidden ones, hidden folders and the __MACOSX litter of some zips are passed over.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: --data takes a folder of pictures or a .zip")
    if path.is_dir():
        try:
            files = [(file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()]
            found = [(name, file.stat().st_size, file.stat().st_mtime_ns) for name, file in files if _is_picture(name)]
        except OSError as error:
            raise InputError(f"{path} cannot be searched ({error}): see who may read it") from error
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if _is_picture(info.filename)]
        except Exception as error:  # a damaged directory can raise more than BadZipFile
            raise InputError(f"{path} is no zip, or is cut off ({error}): --data takes a folder of pictures or a whole .zip") from error
        if any(info.flag_bits & 1 for info in members):
            raise InputError(f"{path} is protected by a password: unpack it and give the folder to --data")
        found = [(info.filename, info.file_size, info.CRC) for info in members]
    if not found:
        raise InputError(f"{path} holds no picture ({' '.join(PICTURES)})")
    return sorted(found)


def _is_picture(name: str) -> bool:
    parts = name.split("/")
    return name.lower().endswith(PICTURES) and not any(part == "__MACOSX" or part.startswith(".") and part != "." for part in parts)


def decode(source, name: str, res: int) -> np.ndarray:
    """One picture of a folder (a Path) or of an open zip -> uint8 (3, res, res); InputError if broken."""
    if isinstance(source, Path):
        return to_tensor(central_square(open_photo(source / name, res), res)).numpy()
    try:
        if source.getinfo(name).file_size > LARGEST_FILE:
            raise InputError(f"larger than {LARGEST_FILE >> 20} MB")
        data = source.read(name)
    except InputError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, NotImplementedError, ...
        raise InputError(f"cannot be unpacked ({error})") from error
    return to_tensor(central_square(open_photo(io.BytesIO(data), res), res)).numpy()


_source = None  # what this process decodes from: a folder, or a zip that is kept open


def _start_decoding(path: Path) -> None:
    """Open the source; in a process of its own also leave Ctrl-C to the parent, and end with it."""
    global _source
    _source = path if path.is_dir() else zipfile.ZipFile(path)
    parent = multiprocessing.parent_process()
    if parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _decode_or_reason(res: int, name: str) -> np.ndarray | str:
    """The pixels of a picture or, where there are none, the reason: one broken picture must not end the others."""
    try:
        return decode(_source, name, res)
    except InputError as error:
        return str(error)


def _decode_all(path: Path, found: list[tuple], res: int):
    """Yield the pixels of every picture, or the reason why it has none, in order; on all cores if that pays."""
    global _source
    names, work = [name for name, *_ in found], functools.partial(_decode_or_reason, res)
    workers = min(os.cpu_count() or 1, 61, sum(size for _, size, _ in found) >> 22)  # a process for 4 MB; Windows takes 61
    if workers < 2:
        try:
            _start_decoding(path)
            yield from map(work, names)
        finally:
            _source = None  # closes the zip
        return
    # fork starts at once; elsewhere each process imports torch first. The children touch none of its threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_decoding, (path,))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of fork beside torch's threads
            decoded = pool.map(work, names, chunksize=64)
        yield from decoded
    except concurrent.futures.BrokenExecutor as error:
        raise InputError(f"a process that decodes {path} was ended from outside (out of memory?): start again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _seal(key: str, count: int) -> bytes:
    """64 bytes at the end of a cache that only a whole cache of just these files can have."""
    return hashlib.sha256(f"{key} {count}".encode()).hexdigest().encode()


def _map_cache(file: Path, key: str, res: int) -> torch.Tensor | None:
    """The cache as a tensor (N, 3, res, res) that is read from disk on demand; None unless whole and right."""
    try:
        table = np.memmap(file, np.uint8, "c")  # copy on write: torch wants a tensor it may write to
    except (OSError, ValueError):
        return None
    count, rest = divmod(len(table) - 64, 3 * res * res)
    if rest or count < 1 or table[-64:].tobytes() != _seal(key, count):
        return None
    return torch.from_numpy(table[:-64].reshape(count, 3, res, res))


def _fill_cache(file: Path, path: Path, found: list[tuple], res: int, key: str) -> torch.Tensor:
    """Decode into a file beside `file`, seal it, move it into place; broken pictures are left out and named."""
    _sweep(file.parent, "*.tmp")
    handle, scratch = tempfile.mkstemp(".tmp", file.stem, file.parent)
    broken, began = [], time.time()
    try:
        with os.fdopen(handle, "wb") as stream, contextlib.closing(_decode_all(path, found, res)) as decoded:
            for done, pixels in enumerate(decoded, 1):
                if isinstance(pixels, str):
                    broken.append(f"{found[done - 1][0]}: {pixels}")
                else:
                    stream.write(pixels.tobytes())
                seconds = time.time() - began
                if seconds > 1:  # the first picture waits for the processes, and tells nothing about the rate
                    rate = done / seconds
                    progress(f"reading {path.name}: {done}/{len(found)} pictures, {rate:.0f}/s{time_left(len(found) - done, rate)}")
            progress(None)
            _report_broken(path, broken, len(found))
            stream.write(_seal(key, len(found) - len(broken)))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, file)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return _map_cache(file, key, res)


def _sweep(folder: Path, pattern: str) -> None:
    """Remove what killed runs left half written: a live one writes to its own all the time, an hour is enough to tell."""
    for old in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another run may sweep here too
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()


def _report_broken(path: Path, broken: list[str], total: int) -> None:
    """Name the first ten on stderr; InputError if they are too many to be an accident."""
    if len(broken) > 0.05 * total:
        raise InputError(f"{path}: {len(broken)} of {total} pictures are broken, the first are {'; '.join(broken[:5])}: mend or remove them")
    if broken:
        print(f"{path}: {len(broken)} of {total} pictures are broken and left out:", *broken[:10], sep="\n  ", file=sys.stderr)


def load_images(path: str | Path, res: int, cache: str | Path = "cache") -> torch.Tensor:
    """A folder (searched to the bottom) or a .zip of pictures -> uint8 (N, 3, res, res), sorted by name.

    Each picture is turned upright, made RGB, cut to its central square and scaled. This is done once, on
    all cores; the result is kept in `cache`, from where it is mapped into memory. The cache is known by the
    path, the files' names, sizes and times, the resolution and the recipe; one that does not fit is made anew.
    Up to 5 % broken pictures are left out and named; InputError if more are, or if there is none.
    """
    path = Path(path)
    found = list_pictures(path)
    where = os.path.abspath(path)
    key = hashlib.sha256(json.dumps([RECIPE, where, path.is_file() and path.stat().st_mtime_ns, res, found]).encode()).hexdigest()
    file = Path(cache) / f"{path.stem}-{hashlib.sha256(where.encode()).hexdigest()[:8]}-{res}.u8"
    images = _map_cache(file, key, res)
    if images is not None:
        return images
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return _fill_cache(file, path, found, res, key)
    except OSError as error:
        print(f"warning: no cache can be kept in {file.parent} ({error}): decoding for this run only", file=sys.stderr)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a mapping outlives its file's name
        return _fill_cache(Path(folder) / file.name, path, found, res, key)


def split(images: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part): the first and the last by name (section 2.5: 80 % and 20 %).

    By order and not at random: CelebA's official partition runs by number too and keeps people apart.
    """
    cut = len(images) - validation_count(len(images), share)
    return images[:cut], images[cut:]


def validation_count(count: int, share: float) -> int:
    """How many of `count` pictures validate."""
    return round(count * share)


# --- Batches --------------------------------------------------------------------------------------


def settle(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Put the training set where its batches cost least: on the GPU if it takes under half of the free memory.

    Else it stays where it is, and `batches` sends one batch ahead.
    """
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return images.to(device) if fits else images


def batches(images: torch.Tensor, size: int, order: torch.Tensor, flip: torch.Tensor, device: torch.device):
    """Yield image batches (size, 3, H, W), float in [0, 1] on `device`, of one epoch.

    `order` (steps * size) says which pictures, `flip` (steps * size) which of them are mirrored. The next batch
    is always on its way while one is used. No DataLoader: picking rows of one tensor leaves nothing to wait for.
    """
    order, flip = order.to(images.device), flip.to(device)
    afar = device.type == "cuda" and not images.is_cuda
    aside = torch.cuda.Stream(device) if afar else None

    def fetch(start):
        chosen = images[order[start : start + size]]
        if not afar:
            return chosen.to(device)
        with torch.cuda.stream(aside):  # from pinned memory the copy runs beside the step, not in its queue
            return chosen.pin_memory().to(device, non_blocking=True)

    coming = fetch(0)
    for start in range(0, len(order), size):
        if afar:
            torch.cuda.current_stream(device).wait_stream(aside)
            coming.record_stream(torch.cuda.current_stream(device))
        pixels, coming = coming, fetch(start + size) if start + size < len(order) else None
        image = pixels.to(memory_format=torch.channels_last).float().div_(255)
        yield torch.where(flip[start : start + size, None, None, None], image.flip(3), image)


# --- Faces that are drawn: a data set with no download --------------------------------------------

SKIN = [(0.96, 0.82, 0.72), (0.89, 0.69, 0.56), (0.78, 0.57, 0.42), (0.58, 0.39, 0.27), (0.38, 0.25, 0.18)]
HAIR = [(0.08, 0.07, 0.07), (0.24, 0.15, 0.10), (0.45, 0.29, 0.16), (0.80, 0.63, 0.36), (0.55, 0.22, 0.12), (0.72, 0.71, 0.70)]
EYES = [(0.25, 0.14, 0.08), (0.40, 0.27, 0.12), (0.33, 0.42, 0.22), (0.30, 0.48, 0.62), (0.42, 0.46, 0.50)]


def _palette(colours: list, t: torch.Tensor) -> torch.Tensor:
    """t (B, 1, 1) in [0, 1) -> colours (B, 3, 1, 1), mixed between neighbours."""
    table, place = torch.tensor(colours), t.view(-1) * (len(colours) - 1)
    low = place.long()
    return torch.lerp(table[low], table[low + 1], (place - low)[:, None])[:, :, None, None]


def _ellipse(plane, cx, cy, rx, ry, soft=0.0):
    """Cover (B, H, W): 1 inside, 0 outside, a slope of width `soft` (at least a pixel) between."""
    y, x, pixel = plane
    radius = (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt_()
    return radius.sub_(1).mul_(-ry / max(soft, pixel)).add_(0.5).clamp_(0, 1)


def _stripe(plane, distance, half, soft=0.0):
    """Cover of the points whose distance from a line is below `half`."""
    return (0.5 + (half - distance.abs()) / max(soft, plane[2])).clamp_(0, 1)


def _paint(canvas, cover, colour, strength=1.0):
    """Mix a colour (B or 1, 3, 1 or H, 1 or W) into the canvas (B, 3, H, W) as far as the cover says."""
    canvas.lerp_(colour.expand_as(canvas), (cover * strength)[:, None].expand_as(canvas))


def _draw_back(canvas, plane, p, vary, flag):
    """What is behind the head: background, hair, shoulders, neck."""
    y, x, _ = plane
    for cover in (torch.ones(1, 1, 1), (y + vary(-0.5, 0.5) * x).clamp(0, 1) * 0.7):
        _paint(canvas, cover, _colour(vary, 0.1, 0.95))
    _paint(canvas, _ellipse(plane, vary(0, 1), vary(0, 0.6), 0.25, 0.3, 0.25), _colour(vary, 0, 1), 0.5)
    long, full = flag(0.55) * (1 - p.male) + flag(0.06) * p.male, vary(0.02, 0.075)
    _paint(canvas, _ellipse(plane, p.cx, 0.66, p.head_rx + full + 0.02, vary(0.36, 0.5), 0.02) * long, p.hair * 0.8)
    _paint(canvas, _ellipse(plane, p.cx, 0.42, p.head_rx + full, p.head_ry + full - 0.02, 0.02), p.hair)
    _paint(canvas, _ellipse(plane, 0.5, 1.14, vary(0.42, 0.56), 0.27, 0.02), _colour(vary, 0.05, 0.9))
    _paint(canvas, _ellipse(plane, p.cx, 0.84, 0.115 + 0.025 * p.male, 0.16, 0.02), p.skin * 0.80)
    _paint(canvas, _ellipse(plane, 0.5, 1.06, 0.14, 0.13, 0.02) * flag(0.5), p.skin * 0.86)


def _draw_head(canvas, plane, p, vary, flag):
    """Ears, the head lit from one side, cheeks, beard, and the hair above the forehead."""
    y, x, _ = plane
    for side in (-1, 1):
        ear_x = p.cx + side * (p.head_rx + 0.004) - 0.02 * p.turn
        _paint(canvas, _ellipse(plane, ear_x, 0.475, 0.034, 0.07, 0.01), p.skin * (0.86 + 0.1 * side * p.light)[:, None])
        _paint(canvas, _ellipse(plane, ear_x, 0.475, 0.016, 0.042, 0.02), p.skin * 0.7, 0.6)
    jaw = _ellipse(plane, p.cx, p.head_y, p.head_rx, p.head_ry, 0.012)
    across, down = (x - p.cx) / p.head_rx, (y - p.head_y) / p.head_ry
    shade = 1.04 + 0.16 * p.light * across - 0.20 * (across**2 + 0.6 * down**2) * across.abs().clamp(0, 1)
    _paint(canvas, jaw, p.skin * shade[:, None])
    blush = p.skin * _rgb(1.04, 0.86, 0.84)
    for side in (-1, 1):
        cheek_x, cheek_y = p.cx + side * 0.135 + 0.015 * p.turn, 0.575 - 0.012 * p.smile
        _paint(canvas, _ellipse(plane, cheek_x, cheek_y, 0.075, 0.05, 0.06), blush, 0.45)
    beard = _ellipse(plane, p.cx, 0.74, 0.19, 0.14, 0.07) * jaw * (flag(0.35) * p.male)
    _paint(canvas, beard, p.hair * 0.8, vary(0.2, 0.75))
    window_x, window_rx = p.cx + vary(-0.07, 0.07), p.head_rx * vary(0.86, 1.0)  # the hair leaves the face free
    window = _ellipse(plane, window_x, vary(0.535, 0.56), window_rx, vary(0.29, 0.345), 0.015)
    cap = _ellipse(plane, p.cx, 0.40, p.head_rx + 0.02, p.head_ry - 0.03, 0.015) * ((0.56 - y) / 0.08).clamp(0, 1)
    strands = 1 + 0.10 * torch.sin(60 * (x - p.cx) * (1 + 0.4 * y) + 6 * vary(0, 1)) + 0.1 * p.light * across
    _paint(canvas, cap * (1 - window) * (1 - flag(0.08) * p.male), p.hair * strands[:, None])


def _draw_eyes(canvas, plane, p, vary, flag):
    """Sockets, eyes, lids, brows, and glasses on some: their outer halves stick out of the hole."""
    y, x, _ = plane
    open_eye = vary(0.019, 0.027) - 0.004 * p.smile
    brow_y, brow_w = vary(0.060, 0.072), vary(0.008, 0.013) + 0.004 * p.male
    gaze, tilt = 0.012 * vary(-1, 1) + 0.006 * p.turn, vary(-0.006, 0.006)
    for side in (-1, 1):
        ex, ey = 0.5 + side * p.eye_dx + 0.008 * p.turn, p.eye_y + side * tilt
        _paint(canvas, _ellipse(plane, ex, ey, 0.072, 0.045, 0.04), p.skin * 0.70, 0.55)
        white = _ellipse(plane, ex, ey, 0.052, open_eye, 0.012)
        _paint(canvas, white, _rgb(0.93, 0.92, 0.90))
        _paint(canvas, _ellipse(plane, ex + gaze, ey, 0.024, 0.024, 0.012) * white, p.iris)
        _paint(canvas, _ellipse(plane, ex + gaze, ey, 0.011, 0.011, 0.012) * white, p.iris * 0.1)
        _paint(canvas, _ellipse(plane, ex + gaze - 0.008, ey - 0.008, 0.005, 0.005, 0.01), _rgb(1, 1, 1), 0.8)
        lid = y - ey + open_eye * (1 - ((x - ex) / 0.056) ** 2)
        _paint(canvas, _stripe(plane, lid, 0.006) * _stripe(plane, x - ex, 0.056), p.hair * 0.25, 0.85 - 0.3 * p.male)
        brow = y - ey + brow_y - 4.5 * (x - ex - side * 0.01) ** 2 + side * 0.12 * (x - ex)
        _paint(canvas, _stripe(plane, brow, brow_w, 0.012) * _stripe(plane, x - ex, 0.066, 0.02), p.hair * 0.65, 0.85)
    glasses, frame, ring = flag(0.2), _colour(vary, 0, 0.35), vary(0.05, 0.066)
    middle, reach = 0.5 + 0.008 * p.turn, p.eye_dx * 0.96
    for side in (-1, 1):
        outer = _ellipse(plane, middle + side * reach, p.eye_y + 0.01, 0.085, ring, 0.01)
        inner = _ellipse(plane, middle + side * reach, p.eye_y + 0.01, 0.075, ring - 0.01, 0.01)
        _paint(canvas, (outer - inner).clamp_(0, 1) * glasses, frame)
    bridge = _stripe(plane, y - p.eye_y, 0.005, 0.01) * _stripe(plane, x - middle, reach - 0.078, 0.01)
    _paint(canvas, bridge * glasses, frame)


def _draw_nose_and_mouth(canvas, plane, p, vary, flag):
    """A nose of shadows and lights, and two lips around a curve that the smile bends; laughing shows teeth."""
    y, x, _ = plane
    nose_x, tip, wide = 0.5 + 0.028 * p.turn, vary(0.55, 0.575), vary(0.034, 0.046) + 0.005 * p.male
    _paint(canvas, _ellipse(plane, nose_x - 0.020 * p.light - 0.012, 0.5, 0.018, 0.085, 0.03), p.skin * 0.66, 0.5)
    _paint(canvas, _ellipse(plane, nose_x + 0.008 * p.light, 0.495, 0.012, 0.08, 0.03), p.skin * 1.22, 0.55)
    _paint(canvas, _ellipse(plane, nose_x, tip + 0.012, wide, 0.022, 0.03), p.skin * 0.72, 0.7)
    _paint(canvas, _ellipse(plane, nose_x + 0.006 * p.light, tip - 0.004, wide * 0.6, 0.022, 0.03), p.skin * 1.18, 0.6)
    for side in (-1, 1):
        _paint(canvas, _ellipse(plane, nose_x + side * wide * 0.55, tip + 0.017, 0.010, 0.007, 0.012), p.skin * 0.3, 0.85)
    mouth_x, mouth_y = 0.5 + 0.02 * p.turn, vary(0.655, 0.685)
    off = (x - mouth_x) / (vary(0.080, 0.095) + 0.014 * p.smile)
    curve = y - mouth_y - 0.030 * p.smile * (0.35 - off**2)
    taper, gap = (1 - off**2).clamp_(min=0), flag(0.5) * (p.smile > 0.3) * vary(0.008, 0.017)
    inside, plump = (taper > 0).float(), vary(0.012, 0.018) - 0.003 * p.male
    lips = p.skin * _rgb(0.94, 0.62, 0.60) * (1 - 0.12 * vary(0, 1) * (1 - p.male))[:, None]
    upper = _stripe(plane, curve + gap * taper + plump * 0.4, (plump + gap) * taper, 0.012)
    lower = _stripe(plane, curve - gap * taper - plump * 0.6, plump * 1.1 * taper, 0.012)
    _paint(canvas, upper * inside, lips * 0.92)
    _paint(canvas, lower * inside, lips * 1.06)
    _paint(canvas, _stripe(plane, curve, gap * taper, 0.01) * (gap * taper > 0), _rgb(0.95, 0.94, 0.91))
    _paint(canvas, _stripe(plane, curve - gap * taper, 0.0035 * taper, 0.01) * inside, lips * 0.42, 0.9)
    _paint(canvas, _ellipse(plane, mouth_x, mouth_y + 0.055, 0.05, 0.013, 0.03), p.skin * 0.75, 0.5)


def _rgb(*colour):
    return torch.tensor(colour)[None, :, None, None].float()


def _colour(vary, low, high):
    return torch.stack([vary(low, high) for _ in range(3)], 1)


def _draw_faces(random: torch.Tensor, res: int) -> torch.Tensor:
    """A face for each row of random numbers (B, 96) -> (B, 3, res, res) in [0, 1]; all lengths in sides of the picture.

    First a person is drawn by lot: what lies in the hole hangs on that, but has chances of its own.
    """
    numbers = iter(random[:, :, None, None].unbind(1))  # (B, 1, 1) each

    def vary(low, high):
        return low + (high - low) * next(numbers)

    def flag(share):
        return (next(numbers) < share).float()

    p = SimpleNamespace(skin=_palette(SKIN, vary(0, 1)) * vary(0.92, 1.06)[:, None])
    p.hair = _palette(HAIR, vary(0, 1)) * vary(0.85, 1.1)[:, None]
    p.iris = _palette(EYES, vary(0, 1))
    p.turn, p.light, p.smile, p.male = vary(-1, 1), vary(-1, 1), vary(-0.5, 1), flag(0.5)
    p.cx, p.eye_y, p.eye_dx = 0.5 + 0.012 * p.turn, vary(0.415, 0.437), vary(0.146, 0.160)
    p.head_rx, p.head_ry, p.head_y = 0.245 * vary(0.92, 1.08), vary(0.325, 0.355), vary(0.475, 0.49)
    line = (torch.arange(res) + 0.5) / res
    plane = line[:, None], line[None, :], 1 / res
    canvas = torch.zeros(len(random), 3, res, res)
    _draw_back(canvas, plane, p, vary, flag)
    _draw_head(canvas, plane, p, vary, flag)
    for draw, top, bottom in ((_draw_eyes, 0.32, 0.52), (_draw_nose_and_mouth, 0.40, 0.78)):  # small parts, small canvas
        rows, columns = slice(int(top * res), int(bottom * res)), slice(int(0.22 * res), int(0.78 * res) + 1)
        draw(canvas[:, :, rows, columns], (line[rows, None], line[None, columns], 1 / res), p, vary, flag)
    return canvas.mul_(vary(0.85, 1.08)[:, None]).clamp_(0, 1)


def synthetic_faces(n: int, res: int, seed: int = 0) -> torch.Tensor:
    """Draw n faces: uint8 (n, 3, res, res), always the same for a seed, aligned like CelebA's.

    Head, hair, ears, brows, eyes, nose, mouth, neck, shoulders and background vary in colour, shape, pose, light and
    expression; some wear glasses or a beard. Much of what the hole hides follows from the rest, but not all.
    """
    numbers = torch.rand(n, 96, generator=torch.Generator().manual_seed(seed))
    faces = torch.empty(n, 3, res, res, dtype=torch.uint8)
    for part in torch.arange(n).split(max(1, (1 << 18) // res**2)):  # parts that stay in the processor's cache
        progress(f"drawing faces: {int(part[0])}/{n}")
        faces[part] = _draw_faces(numbers[part], res).mul_(255).round_().to(torch.uint8)
    progress(None)
    return faces


# --- Writing and drawing --------------------------------------------------------------------------


def save(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: aside, flushed to the disk, then renamed into place."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # its own: two runs in one folder may not share it
    _sweep(path.parent, f".{glob.escape(path.name)}.*.tmp")
    try:
        with open(aside, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


_shown = ["", time.time()]  # the progress line on the screen, and when one was last written


def progress(line: str | None) -> None:
    """One line on stderr that is written over; None ends it. Without a terminal: a plain line each 10 seconds."""
    terminal = sys.stderr.isatty()
    if line is None:
        if terminal and _shown[0]:
            print("\r" + " " * len(_shown[0]) + "\r", end="", file=sys.stderr, flush=True)
        _shown[0] = ""
    elif time.time() - _shown[1] > (0.2 if terminal else 10):
        if terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        print(f"\r{line:<{len(_shown[0])}}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        _shown[:] = line, time.time()


def time_left(remaining: float, rate: float) -> str:
    """', 3 min 20 s left' for the progress line; nothing before a rate is known."""
    if rate <= 0:
        return ""
    minutes, seconds = divmod(round(remaining / rate), 60)
    return f", {minutes} min {seconds:02d} s left" if minutes else f", {seconds} s left"


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W), uint8 or float in [0, 1] -> RGB picture."""
    if image.is_floating_point():
        image = image.float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())


def grid(strips: list[tuple[str, torch.Tensor]], upright: bool = False, tile: int = 128) -> Image.Image:
    """A labelled table of pictures: each strip (label, images (N, 3, H, W)) is a row, or a column if `upright`.

    Small pictures are enlarged by a whole number of times, pixel by pixel, to about `tile`: nothing is made smoother.
    """
    font = ImageFont.load_default(15)
    size, count = strips[0][1].shape[-1], max(len(images) for _, images in strips)
    side, gap, margin = size * max(1, tile // size), 4, 8
    lines = 1 + max(label.count("\n") for label, _ in strips)
    label_w = 0 if upright else max(round(font.getlength(label)) for label, _ in strips) + 2 * margin
    label_h = 20 * lines + margin if upright else 0
    across, down = (len(strips), count) if upright else (count, len(strips))
    sheet = Image.new("RGB", (label_w + across * (side + gap) + gap, label_h + down * (side + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for s, (label, images) in enumerate(strips):
        if upright:
            pen.text((gap + (s + 0.5) * (side + gap), label_h / 2), label, "black", font, "mm", align="center")
        else:
            pen.text((margin, gap + (s + 0.5) * (side + gap)), label, "black", font, "lm")
        for k, image in enumerate(images):
            column, row = (s, k) if upright else (k, s)
            picture = to_picture(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (label_w + gap + column * (side + gap), label_h + gap + row * (side + gap)))
    return sheet


def side_by_side(parts: dict[str, Image.Image]) -> Image.Image:
    """Labelled pictures of any size beside each other, each scaled to be 384 pixels high or, if that is less, 512 wide."""
    font, left, height, thumbs = ImageFont.load_default(15), 4, 384, {}
    for label, picture in parts.items():
        scale = min(512 / picture.width, height / picture.height)
        thumbs[label] = picture.resize(tuple(max(1, round(side * scale)) for side in picture.size))
    sheet = Image.new("RGB", (4 + sum(max(t.width, 80) + 4 for t in thumbs.values()), height + 32), "white")
    for label, thumb in thumbs.items():
        ImageDraw.Draw(sheet).text((left + max(thumb.width, 80) / 2, 14), label, "black", font, "mm")
        sheet.paste(thumb, (left, 28))
        left += max(thumb.width, 80) + 4
    return sheet


COLOURS = ["#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#6a4c93"]


def curves(rows: list[dict], panels: dict[str, list[str]]) -> Image.Image:
    """Line charts side by side: for each panel (title: columns of the log), every column over the epochs."""
    width, height, left, top, bottom = 420, 300, 58, 34, 40
    font = ImageFont.load_default(13)
    sheet = Image.new("RGB", (width * len(panels), height), "white")
    pen = ImageDraw.Draw(sheet)
    epochs = [row["epoch"] for row in rows]
    for k, (title, names) in enumerate(panels.items()):
        x0, x1, y0, y1 = k * width + left, (k + 1) * width - 16, height - bottom, top
        values = [row[name] for name in names for row in rows if math.isfinite(row[name])] or [0.0]
        low, high = min(values), max(values)
        low, high = (low - 0.05 * (high - low), high + 0.05 * (high - low)) if high > low else (low - 0.5, high + 0.5)
        low = max(low, 0.0) if min(values) >= 0 else low
        ends = [(row[name] - low) / (high - low) for name in names for row in rows[-1 - len(rows) // 5 :] if math.isfinite(row[name])]
        first, last = epochs[0], max(epochs[-1], epochs[0] + 1)
        pen.text((x0, 6), title, "black", ImageFont.load_default(15))
        for tick in range(5):
            y = y0 + (y1 - y0) * tick / 4
            pen.line((x0, y, x1, y), "#dddddd")
            pen.text((x0 - 6, y), f"{low + (high - low) * tick / 4:.4g}", "#555555", font, "rm")
        for epoch in sorted({first, (first + last) // 2, last}):
            pen.text((x0 + (x1 - x0) * (epoch - first) / (last - first), y0 + 6), str(epoch), "#555555", font, "mt")
        pen.text(((x0 + x1) / 2, height - 4), "epoch", "#555555", font, "mb")
        for n, name in enumerate(names):
            points = [
                (x0 + (x1 - x0) * (e - first) / (last - first), y0 + (y1 - y0) * (row[name] - low) / (high - low))
                for e, row in zip(epochs, rows)
                if math.isfinite(row[name])
            ]
            pen.line(points, COLOURS[n % 5], 2) if len(points) > 1 else None
            for px, py in points[:: max(1, len(points) // 40)]:
                pen.ellipse((px - 2, py - 2, px + 2, py + 2), COLOURS[n % 5])
            place = y1 + 4 + 17 * n if sum(ends) < len(ends) / 2 else y0 - 4 - 17 * (len(names) - n)  # where the curves do not end
            pen.text((x1 - 4, place), name, COLOURS[n % 5], font, "ra")
    return sheet
