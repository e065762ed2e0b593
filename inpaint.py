"""Chapter 4, inpaint.py: train, measure, compare, restore (paper, sections 2.5, 3 and 4).

    python inpaint.py --model gan --act relu --res 64         the paper's GAN, on faces that are drawn: no download
    python inpaint.py --model unet --data img_align_celeba.zip             the paper's U-Net, on CelebA
    python inpaint.py --resume --out runs/NAME                             go on with a run that was stopped
    python inpaint.py --evaluate runs/NAME/best.pt                         measure it again
    python inpaint.py --restore me.jpg --checkpoint runs/NAME/best.pt      your own photo
    python inpaint.py --compare --data img_align_celeba.zip                the paper's table 1 and figure 4
    torchrun --nproc-per-node 4 inpaint.py --model unet ...                several GPUs
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import losses
import models
from data import InputError

# --- Options --------------------------------------------------------------------------------------

# The paper's two networks. Only defaults: what trains is decided by the terms of --loss.
DEFAULTS = {
    "unet": {"res": 128, "loss": "l1", "depth": 5, "batch": 32, "epochs": 20},
    "gan": {"res": 64, "loss": "adversarial", "depth": 4, "batch": 64, "epochs": 12},
}
COMMON = {
    "act": "relu", "hole_weight": 10.0, "data": "synthetic", "hole": 0.3, "hole_at": "center", "val": 0.2,
    "width": 24, "seed": 0, "precision": "auto",
}  # fmt: skip


def number(kind: type, low: float, high: float, what: str):
    """An argparse type: a whole or real number between two bounds, both included."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} will not do: it takes {what}")
        return value

    return read


COUNT = number(int, 1, 10**6, "a whole number from 1 to 1,000,000")
OPEN_UNIT = number(float, 1e-6, 1 - 1e-6, "a number between 0 and 1")


def resolution(text: str) -> int:
    """An argparse type: a power of two from 32 to 512."""
    if text not in ("32", "64", "128", "256", "512"):
        raise argparse.ArgumentTypeError(f"{text!r} will not do: it takes 32, 64, 128, 256 or 512")
    return int(text)


def loss_terms(text: str) -> str:
    """An argparse type: the text, without its spaces, once it has proved to be a loss."""
    text = text.replace(" ", "")
    try:
        losses.parse_loss(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parser() -> argparse.ArgumentParser:
    """The command line. Training options have no default here: only what was given may contradict a stored run."""
    p = argparse.ArgumentParser(
        "inpaint.py", description=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.error = lambda message: stop(f"{message}; --help lists all options", 2)  # argparse would print the usage first
    job = p.add_argument_group("jobs (without one of these: train)")
    job.add_argument("--evaluate", metavar="CHECKPOINT", help="measure a best.pt or last.pt on validation pictures")
    job.add_argument("--json", metavar="FILE", help="with --evaluate: also write the figures to FILE")
    job.add_argument("--restore", nargs="+", metavar="PHOTO", help="fill the hole of photos, or of all in a folder")
    job.add_argument("--checkpoint", help="with --restore: the best.pt of a run")
    job.add_argument("--mask", help="with --restore: a picture of the photo's shape, white where it is missing; default: the hole of the training")
    job.add_argument("--compare", action="store_true", help="train all rows of the paper's table 1, and more")
    job.add_argument("--seeds", type=number(int, 1, 100, "a whole number from 1 to 100"), metavar="K", help="with --compare: train each row K times; default 1")
    what = p.add_argument_group("what to train")
    what.add_argument("--model", choices=DEFAULTS, help="the paper's network: sets the defaults of --res, --loss, --depth, --batch and --epochs; default unet")
    what.add_argument("--act", choices=models.ACTIVATIONS, help="activation function; default relu")
    what.add_argument("--loss", type=loss_terms, metavar="TERMS", help=f"a sum of {', '.join(losses.TERMS)}, as in 100*l1+adversarial; any with adversarial has a discriminator; default l1 (unet) or adversarial (gan)")
    what.add_argument("--hole-weight", type=number(float, 1e-3, 1e6, "a number from 0.001 to 1,000,000"), metavar="X", help="l1 and mse count pixels in the hole X times (the paper: 1); default 10")
    what.add_argument("--depth", type=number(int, 1, 9, "a whole number from 1 to 9"), metavar="N", help="levels of the U-Net; one more sees further; default 5 (unet) or 4 (gan)")
    what.add_argument("--width", type=number(int, 1, 1024, "a whole number from 1 to 1024"), metavar="N", help="channels of the first level; raise to 64 for 200,000 pictures and a GPU; default 24")
    d = p.add_argument_group("data")
    d.add_argument("--data", metavar="PATH", help="a folder of pictures or a .zip, such as CelebA's; default synthetic: 5,000 faces that are drawn")
    d.add_argument("--res", type=resolution, metavar="N", help="side in pixels: 32, 64, 128, 256 or 512; default 128 (unet) or 64 (gan)")
    d.add_argument("--hole", type=OPEN_UNIT, metavar="F", help="side of the hole as a share of the picture's; default 0.3")
    d.add_argument("--hole-at", choices=["center", "random"], help="random: for photos with holes elsewhere; half of the holes are in the centre still; default center")
    d.add_argument("--val", type=number(float, 1e-6, 1, "a number above 0 and below 1 (1 with --evaluate)"), metavar="F", help="share of the pictures, the last by name, that validates; default 0.2")
    t = p.add_argument_group("training")
    t.add_argument("--epochs", type=COUNT, metavar="N", help="times through the training pictures; the learning rate falls to 0 over them; default 20 (unet), 12 (gan) or 20 (--compare)")
    t.add_argument("--batch", type=COUNT, metavar="N", help="pictures a step, for each process; raise to 256 on a GPU, and --lr with it; default 32 (unet) or 64 (gan)")
    t.add_argument("--lr", type=number(float, 1e-12, 10, "a number above 0 and at most 10"), metavar="X", help="learning rate of Adam at the start; the discriminator's is at most 0.0002; default 0.002, for adversarial alone 0.0002")
    t.add_argument("--seed", type=number(int, 0, 2**31, "a whole number from 0 to 2,147,483,648"), metavar="N", help="of weights and order; default 0")
    r = p.add_argument_group("running")
    r.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default auto: a GPU if there is one")
    r.add_argument("--precision", choices=["auto", "bfloat16", "float32"], help="of the networks; default auto: bfloat16 where the device is fast at it")
    r.add_argument("--compile", action="store_true", help="compile the networks first (minutes, then faster on a GPU)")
    r.add_argument("--out", metavar="DIR", help="folder for what is written; default runs/MODEL-LOSS-ACT-RES, runs/compare or restored")
    r.add_argument("--resume", action="store_true", help="go on with the run in --out from its last epoch; more --epochs may be given")
    return p


def training_options(args: argparse.Namespace) -> dict:
    """Every option that decides what is trained: those given, then those of --model, then the common ones."""
    given = vars(args)
    model = args.model or "unet"
    options = {"model": model} | COMMON | DEFAULTS[model]
    options |= {name: given[name] for name in [*options, "lr"] if given[name] is not None}
    options.setdefault("lr", 2e-4 if set(losses.parse_loss(options["loss"])) == {"adversarial"} else 2e-3)
    check_options(options)
    return options


def check_options(options: dict) -> None:
    """What one option alone cannot tell; InputError if they do not fit together."""
    res, side = options["res"], round(options["res"] * options["hole"])
    if not 1 <= side < res:
        raise InputError(f"--hole {options['hole']} of --res {res} is {side} pixels wide: it must hide some pixels and leave some")
    if 2 ** options["depth"] > res:
        raise InputError(f"--depth {options['depth']} halves --res {res} below one pixel: at most {int(math.log2(res))} levels fit")
    if options["val"] == 1:
        raise InputError("--val 1 leaves no picture to train on: it is for --evaluate only")


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps -> a device that is there; under torchrun each process takes the GPU of its number."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        raise InputError(f"--device {name}: this machine or this build of PyTorch has none; leave the option out")
    if name != "cuda":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise InputError(f"process {index} finds {torch.cuda.device_count()} GPUs here: start one process a GPU with --nproc-per-node")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32; PyTorch would round convolutions to 10 bits
    return torch.device("cuda", index)


def fast_bfloat16(device: torch.device) -> bool:
    """Does the device multiply bfloat16 faster than float32? GPUs from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tests = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return device.type == "cpu" and any(test() for test in tests if test)


# --- Several processes (torchrun) -----------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Let no process go on before all have come here."""
    if dist.is_initialized():
        dist.barrier()


def first_process_first(work):
    """work() in process 0, then in the others, which find what it left on the disk."""
    rank, _ = rank_and_world()
    result = work() if rank == 0 else None
    wait_for_all()
    return result if rank == 0 else work()


def average_buffers(network: torch.nn.Module) -> None:
    """Batch norm's statistics are each process's own during an epoch; before validation they become their mean."""
    _, world = rank_and_world()
    for buffer in network.buffers() if world > 1 else ():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= world


# --- What is trained ------------------------------------------------------------------------------

WEIGHT_DECAY = 0.05  # of the networks that only reconstruct: a little against learning the faces by heart
JUDGE_RATE = 2e-4  # DCGAN's learning rate; a discriminator that learns faster wins before the painter can paint
SMOOTH = 0.1  # real pictures are to be judged 0.9 real: keeps the discriminator from certainty


@dataclass
class Run:
    """Everything that changes while a run trains. `painter` and `judge` are the networks as the step calls them,
    wrapped if there are several processes; `generator` and `discriminator` the same, bare."""

    options: dict
    device: torch.device
    generator: models.UNet
    ema: models.UNet
    discriminator: models.Discriminator | None
    painter: torch.nn.Module = None
    judge: torch.nn.Module = None
    optimizers: dict = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    best: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    setting: list = field(default_factory=list)  # how many processes and training pictures: a resume needs the same

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """The terms of the loss and what they count."""
        return losses.parse_loss(self.options["loss"])

    @functools.cached_property
    def bfloat16(self) -> bool:
        """Whether the networks run in bfloat16: asked for, or left to the device."""
        wanted = self.options["precision"]
        return wanted == "bfloat16" or wanted == "auto" and fast_bfloat16(self.device)

    def autocast(self):
        """bfloat16 for the networks where it is wanted; losses and metrics stay outside."""
        return torch.autocast(self.device.type, torch.bfloat16, self.bfloat16)


def build(options: dict, device: torch.device, compiled: bool = False) -> Run:
    """Networks with fresh weights (a function of the seed alone), their averages and optimisers."""
    torch.manual_seed(options["seed"])
    terms = losses.parse_loss(options["loss"])
    generator = models.UNet(options["depth"], options["width"], options["act"])
    discriminator = models.Discriminator(options["res"], options["width"]) if "adversarial" in terms else None
    for network in (generator, discriminator) if discriminator else ():
        models.dcgan_init(network)
    if discriminator:
        generator.start_by_keeping()
    networks = [net.to(device, memory_format=torch.channels_last) for net in (generator, discriminator) if net]
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    run = Run(options, device, generator, ema, discriminator)
    decay = 0.0 if discriminator else WEIGHT_DECAY
    for name, network in zip(("generator", "discriminator"), networks):
        run.optimizers[name] = torch.optim.AdamW(
            network.parameters(), options["lr"], betas=(0.5, 0.999), weight_decay=decay, fused=device.type != "mps"
        )
        if compiled:
            network.compile()
    called = networks
    if dist.is_initialized():
        ids = [device.index] if device.type == "cuda" else None
        called = [DistributedDataParallel(network, ids, forward_sync_buffers=False) for network in called]
    run.painter, run.judge = called[0], called[1] if discriminator else None
    return run


def learning_rate(start: float, step: int, total: int) -> float:
    """Falls in a straight line from `start` to 0 over all steps: the last ones only polish (section 2.5: convergence)."""
    return start * (1 - step / total)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, network: torch.nn.Module, step: int) -> None:
    """ema <- decay * ema + (1 - decay) * network, batch norm's statistics included; decay = min(0.999, (n + 1) / (n + 10)).

    A mean over the last 1,000 steps or so: the same as a lower learning rate, before the rate is low.
    """
    share = 1 - min(0.999, (step + 1) / (step + 10))
    for mean, value in zip(ema.state_dict().values(), network.state_dict().values()):
        mean.lerp_(value, share) if mean.is_floating_point() else mean.copy_(value)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def training_step(run: Run, image: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Damage, paint, judge, update: one batch image (B, 3, H, W) with its holes (B, 1, H, W) -> what is logged.

    Nothing here waits for the device: the numbers are tensors until somebody reads them.
    """
    damaged, weights, terms, report = data.damage(image, mask), run.weights, {}, {}
    with run.autocast():
        output = run.painter(damaged, mask)
    if run.judge:
        # (1) The discriminator's step: maximise log D(x) + log(1 - D(G)). It teaches the painter nothing: detach.
        with run.autocast():
            real, fake = run.judge(image), run.judge(output.detach())
        report["d_loss"] = losses.discriminator_loss(real, fake, SMOOTH)
        update(run.optimizers["discriminator"], report["d_loss"])
        report |= {"D(x)": real.sigmoid().mean(), "D(G)": fake.sigmoid().mean()}
        # (2) The painter's step: maximise log D(G), by a fresh judgement of a discriminator that holds still.
        run.discriminator.requires_grad_(False)
        with run.autocast():
            terms["adversarial"] = losses.generator_loss(run.discriminator(output))
        run.discriminator.requires_grad_(True)
    # And, with any network: minimise the distance from the original.
    if "l1" in weights:
        terms["l1"] = losses.l1(output, image, mask, run.options["hole_weight"])
    if "mse" in weights:
        terms["mse"] = losses.mse(output, image, mask, run.options["hole_weight"])
    if "dssim" in weights:
        terms["dssim"] = losses.dssim(output, image)
    update(run.optimizers["generator"], sum(weights[name] * term for name, term in terms.items()))
    update_ema(run.ema, run.generator, run.step)
    run.step += 1
    return {name: value.detach() for name, value in (terms | report).items()}


# --- Measuring ------------------------------------------------------------------------------------

METRICS = ("psnr_output", "psnr_restored", "psnr_hole", "ssim_restored")
EVAL_BATCH = 100  # at 64 px


def restore(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The output pasted into the hole of the picture: what a user would keep."""
    return output * mask + image * (1 - mask)


def measure(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One value a picture of each metric: (4, B), in the order of METRICS.

    psnr_output: the whole output against the original, what the paper's table meant to show. psnr_restored: the known
    pixels are the original's, so psnr_hole + 10 log10(1 / area of the hole). psnr_hole: only inside the hole.
    """
    restored = restore(output, image, mask)
    psnrs = losses.psnr(output, image), losses.psnr(restored, image), losses.psnr(output, image, mask)
    return torch.stack([*psnrs, losses.ssim(restored, image)])


@torch.no_grad()
def paint(run: Run, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the averaged network, in evaluation mode, paints for original images (B, 3, H, W) in [0, 1]."""
    with run.autocast():
        return run.ema(data.damage(images, mask).contiguous(memory_format=torch.channels_last), mask)


def validate(painter, pixels: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Each metric's mean of the per-picture values over a validation set, uint8 (N, 3, res, res).

    `painter(images)` -> outputs (B, 3, res, res): a network, or a method without one.
    """
    values = []
    for part in pixels.split(max(1, EVAL_BATCH * 64**2 // pixels.shape[2] ** 2)):  # as much memory at any resolution
        image = part.to(mask.device).float() / 255
        values.append(measure(painter(image), image, mask))
    return dict(zip(METRICS, torch.cat(values, 1).cpu().double().mean(1).tolist())) | {"pictures": len(pixels)}


# --- The run folder -------------------------------------------------------------------------------

KIND, VERSION = "face inpainting checkpoint", 1


def to_json(value: dict) -> bytes:
    """A dictionary as the bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def save_checkpoint(path: Path, run: Run, everything: bool) -> None:
    """best.pt: weights and options. last.pt: also all that a resume needs. Tensors and plain types only.

    There is no random state to keep: that of an epoch is made from the seed and the epoch's number (draw_epoch).
    """
    state = {"kind": KIND, "version": VERSION, "options": run.options, "epoch": run.epoch, "ema": run.ema.state_dict()}
    if everything:
        state |= {"step": run.step, "best": run.best, "rows": run.rows, "generator": run.generator.state_dict()}
        state |= {"setting": run.setting, "optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}}
        state |= {"discriminator": run.discriminator.state_dict()} if run.discriminator else {}
    stream = io.BytesIO()
    torch.save(state, stream)
    data.save(path, stream.getbuffer())


def read_checkpoint(path: str | Path, device: torch.device) -> dict:
    """The dictionary of a checkpoint whose options are sound; InputError for any other file. Runs no code from it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a strange file torch warns, and then it fails
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the best.pt or last.pt of a run folder") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give {Path(path) / 'best.pt'}") from None
    except Exception as error:  # what torch says of a strange file fills a screen and helps nobody
        raise InputError(f"{path} is no checkpoint, or damaged: give the best.pt or last.pt of another run, or train again") from error
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise InputError(f"{path} is a file of another program: give the best.pt or last.pt of a run folder")
    if state.get("version") != VERSION:
        raise InputError(f"{path} has version {state.get('version')} and this program reads {VERSION}: train again, or use its own version")
    return state | {"options": sound_options(path, state.get("options"))}


def sound_options(path: str | Path, options: dict) -> dict:
    """The options of a file, if the command line would have taken them; else InputError."""

    def refuse(message):
        raise ValueError(message)

    p = parser()
    p.error = refuse
    try:
        checked = training_options(p.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in options.items()]))
        if checked != options:
            raise ValueError("some are missing or of another type")
    except (InputError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"the options in {path} are damaged ({error}): give another file, or start a new run") from error
    return options


def check_same(given: dict, stored: dict, folder: Path, advice: str | None = None) -> None:
    """InputError naming both values if an option given (not None) contradicts the run in the folder."""
    special = {"data": "put the pictures back there, or start a new run", "epochs": "give more than that, or leave it out"}
    for name, value in stored.items():
        new = given.get(name)
        if new not in (None, value):
            flag = "--" + name.replace("_", "-")
            what_to_do = advice or special.get(name, "leave it out, or start a new run")
            raise InputError(f"{flag} {new} contradicts {flag} {value} of the run in {folder}: {what_to_do}")


def load_painter(path: str | Path, device: torch.device) -> Run:
    """A run, good for painting only, from a checkpoint."""
    state = read_checkpoint(path, device)
    try:
        run = build(state["options"] | {"loss": "l1"}, device)
        run.ema.load_state_dict(state["ema"])
        run.epoch = state["epoch"]
    except Exception as error:
        raise InputError(f"{path} is damaged: its weights do not fit its options") from error
    run.options = state["options"]
    return run


def load_everything(path: Path, run: Run) -> None:
    """Bring a run back to where its last.pt was written."""
    state = read_checkpoint(path, run.device)
    try:
        run.ema.load_state_dict(state["ema"])
        run.generator.load_state_dict(state["generator"])
        if run.discriminator:
            run.discriminator.load_state_dict(state["discriminator"])
        for name, optimizer in run.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        run.step, run.epoch, run.best, run.rows = (state[name] for name in ("step", "epoch", "best", "rows"))
        then = state["setting"]
    except Exception as error:
        raise InputError(f"{path} cannot be resumed: it is a best.pt, or damaged; give the folder of a run") from error
    if then != run.setting:
        now = run.setting
        raise InputError(f"the run in {path.parent} had {then[0]} processes and {then[1]} training pictures, now it is {now[0]} and {now[1]}: start it as before")


def default_folder(options: dict) -> str:
    """runs/MODEL-LOSS-ACT-RES, with no character that a file system minds."""
    return f"runs/{options['model']}-{options['loss'].replace('*', 'x')}-{options['act']}-{options['res']}"


def numbered(name: str) -> list[Path]:
    """All folders NAME, NAME-2, NAME-3, ... that exist, in order, then the first that does not."""
    found = [Path(name)]
    while found[-1].exists():
        found.append(Path(f"{name}-{len(found) + 1}"))
    return found


def make_folder(folder: Path) -> list[Path]:
    """Make a folder that is not there yet and those above it -> what was made, so that a mistake can leave nothing."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True)
    return new


def choose_folder(args: argparse.Namespace) -> tuple[Path, list[Path]]:
    """(where to write, the folders made for it): --out, or the default name, numbered, that no other run can take then.

    InputError if it cannot be written to, already holds a run or, with --resume, holds none.
    """
    name = args.out or default_folder(training_options(args))
    if args.resume:
        folder = Path(name) if args.out else (numbered(name)[:-1] or [Path(name)])[-1]
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(str(file.parent) for file in Path("runs").glob("*/config.json"))) or "none in runs/"
            raise InputError(f"--resume: there is no run in {folder.absolute()}; name its folder with --out (here: {known}), or start without --resume")
        return folder, []
    folder = Path(name)
    if args.out and (folder / "config.json").exists():
        raise InputError(f"--out {folder} already holds a run: go on with it by --resume, or name another folder")
    check_writable(folder)
    if args.out:
        return folder, [] if folder.exists() else make_folder(folder)
    while True:
        folder = numbered(name)[-1]
        with contextlib.suppress(FileExistsError):
            return folder, make_folder(folder)


def check_writable(folder: Path) -> None:
    """InputError unless the folder is there, or can be made, and can be written to."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: {parent.absolute()} is no folder that can be written to; name another")


def stored_options(folder: Path, args: argparse.Namespace) -> dict:
    """The options of a stored run; those given now may not contradict them, but --epochs may grow."""
    if (folder / "last.pt").exists():
        options = read_checkpoint(folder / "last.pt", torch.device("cpu"))["options"]
    elif (folder / "best.pt").exists():
        raise InputError(f"{folder / 'last.pt'} is missing, and no run goes on without it; best.pt still restores and can be evaluated")
    else:
        try:
            options = json.loads((folder / "config.json").read_text())["options"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} cannot be read ({error}): start a new run") from error
        sound_options(folder / "config.json", options)
    more = {"epochs": args.epochs} if (args.epochs or 0) > options["epochs"] else {}
    check_same(vars(args) | dict.fromkeys(more), options, folder)
    return options | more


def describe(run: Run) -> dict:
    """config.json: every option, versions, device, parameter counts."""
    networks = {"generator": run.generator, "discriminator": run.discriminator}
    return {
        "options": run.options,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__},
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{run.device.type} {platform.machine()}",
        "precision": "bfloat16" if run.bfloat16 else "float32",
        "processes": rank_and_world()[1],
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in networks.items() if net},
    }


def to_csv(rows: list[dict]) -> bytes:
    """Rows with the same keys as the bytes of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_log(folder: Path, run: Run) -> None:
    """log.csv and curves.png, whole, from the rows that last.pt keeps."""
    data.save(folder / "log.csv", to_csv(run.rows))
    panels = {"loss": list(run.weights)} | ({"D(x) and D(G)": ["D(x)", "D(G)"]} if run.discriminator else {})
    panels |= {"PSNR in the hole (dB)": ["psnr_hole"], "PSNR of the whole output (dB)": ["psnr_output"]}
    data.save(folder / "curves.png", data.png(data.curves(run.rows, panels)))


def write_pictures(folder: Path, run: Run, pixels: torch.Tensor, mask: torch.Tensor, best: bool) -> None:
    """grid.png, if these are the best weights: eight fixed validation faces, damaged, output, restored, original.

    frames/EPOCH.png: three of them, restored, for training.gif.
    """
    image = pixels[:8].to(run.device).float() / 255
    output = paint(run, image, mask)
    restored = restore(output, image, mask)
    if best:
        strips = [("damaged", data.damage(image, mask)), ("output", output), ("restored", restored), ("original", image)]
        data.save(folder / "grid.png", data.png(data.grid(strips)))
    (folder / "frames").mkdir(exist_ok=True)
    name = f"{run.epoch:04d}"  # as many digits in each, or the faces would jump in the film
    data.save(folder / "frames" / f"{name}.png", data.png(data.grid([(f"epoch {name}", restored[:3])])))


def write_gif(folder: Path) -> None:
    """training.gif from all frames on the disk, the last one shown longer."""
    frames = [PIL.Image.open(file).convert("RGB") for file in sorted((folder / "frames").glob("*.png"))]
    if not frames:
        return
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:], duration=[200] * (len(frames) - 1) + [2000], loop=0)
    data.save(folder / "training.gif", stream.getvalue())


# --- Training -------------------------------------------------------------------------------------


def load_pixels(options: dict) -> torch.Tensor:
    """The data set of --data as uint8 (N, 3, res, res)."""
    if options["data"] == "synthetic":
        return data.synthetic_faces(data.SYNTHETIC, options["res"])
    return first_process_first(lambda: data.load_images(options["data"], options["res"]))


def load_split(options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part) of --data; what is too little is refused before and after broken ones are left out."""
    if options["data"] != "synthetic":
        check_split(options, len(data.list_pictures(Path(options["data"]))))
    pixels = load_pixels(options)
    check_split(options, len(pixels))
    return data.split(pixels, options["val"])


def check_split(options: dict, count: int) -> None:
    """InputError if `count` pictures leave too few to train on (two for each process) or none to validate."""
    validating, need = data.validation_count(count, options["val"]), 2 * rank_and_world()[1]
    if count - validating < need or not validating:
        raise InputError(
            f"--val {options['val']} of the {count} pictures in --data {options['data']} leaves {count - validating} to train on"
            f" and {validating} to validate: it takes at least {need} and 1"
        )


def draw_epoch(options: dict, epoch: int, count: int, take: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The chances of one epoch, a function of seed, epoch and process alone: order, mirrored or not, holes.

    The same shuffled order in all processes, from which each takes its own pictures, `take` of them.
    """
    rank, world = rank_and_world()
    shared = torch.Generator().manual_seed(options["seed"] * 1_000_003 + epoch)
    order = torch.randperm(count, generator=shared)[rank::world][:take]
    own = torch.Generator().manual_seed((options["seed"] * 1_000_003 + epoch) * 1009 + rank)
    flip = torch.rand(take, generator=own) < 0.5
    if options["hole_at"] == "random":
        return order, flip, data.random_boxes(take, options["res"], options["hole"], own)
    return order, flip, data.center_box(options["res"], options["hole"]).expand(take, 4)


def check_finite(run: Run, sums: dict[str, torch.Tensor]) -> None:
    """InputError naming the first term that is not a number any more."""
    for name, value in sums.items():
        if not math.isfinite(value):
            raise InputError(
                f"{name} is {float(value)} in epoch {run.epoch + 1}, before step {run.step}: the run is stopped and its last"
                f" epoch kept; try --lr {run.options['lr'] / 4:g}, or --precision float32, in a new run"
            )


def train_epoch(run: Run, training: torch.Tensor, batch: int) -> dict[str, float]:
    """All batches of one epoch -> the means of what training_step reports."""
    options, sums, began, shown = run.options, {}, time.time(), time.time()
    steps = len(training) // rank_and_world()[1] // batch
    total = options["epochs"] * steps
    order, flip, boxes = draw_epoch(options, run.epoch, len(training), steps * batch)
    boxes = boxes.to(run.device)
    for i, image in enumerate(data.batches(training, batch, order, flip, run.device)):
        for name, optimizer in run.optimizers.items():
            highest = options["lr"] if name == "generator" else min(options["lr"], JUDGE_RATE)
            optimizer.param_groups[0]["lr"] = learning_rate(highest, run.epoch * steps + i, total)
        report = training_step(run, image, data.box_mask(boxes[i * batch : (i + 1) * batch], options["res"]))
        sums = {name: sums.get(name, 0) + value for name, value in report.items()}
        if time.time() - shown > 1:
            check_finite(run, sums)
            shown = time.time()
            rate = (i + 1) * batch / (shown - began)
            means = "  ".join(f"{name} {float(value) / (i + 1):.4f}" for name, value in sums.items())
            say(f"epoch {run.epoch + 1}/{options['epochs']}  step {i + 1}/{steps}  {rate:.0f} images/s  {means}"
                f"{data.time_left((total - run.epoch * steps - i - 1) * batch, rate)}")  # fmt: skip
    check_finite(run, sums)
    for part in filter(None, (run.generator, run.discriminator, run.ema)):
        check_finite(run, {f"a weight ({name})": value.sum() for name, value in part.state_dict().items()})
    return {name: float(value) / steps for name, value in sums.items()}


def say(line: str) -> None:
    """The progress line, from the first process only."""
    if rank_and_world()[0] == 0:
        data.progress(line)


def finish_epoch(run: Run, folder: Path, row: dict, validation: torch.Tensor, mask: torch.Tensor) -> None:
    """Validate and write, in the first process: what hangs on the weights first, then last.pt, then the log."""
    result = validate(lambda image: paint(run, image, mask), validation, mask)
    row |= {name: result[name] for name in METRICS}
    run.rows.append(row)
    reconstructs = set(run.weights) != {"adversarial"}
    best = not run.best or not reconstructs or result["psnr_hole"] > run.best["psnr_hole"]
    if best:
        run.best = result | {"epoch": run.epoch}
        save_checkpoint(folder / "best.pt", run, everything=False)
        data.save(folder / "results.json", to_json(run.best))
    write_pictures(folder, run, validation, mask, best)
    save_checkpoint(folder / "last.pt", run, everything=True)
    write_log(folder, run)
    data.progress(None)
    means = "  ".join(f"{name} {row[name]:.4f}" for name in [*run.weights, "D(x)", "D(G)"] if name in row)
    print(f"epoch {run.epoch}/{run.options['epochs']}  {row['seconds']:.0f} s so far  {row['images_per_second']:.0f} images/s  {means}"
          f"  psnr_hole {row['psnr_hole']:.2f}  psnr_output {row['psnr_output']:.2f}", flush=True)  # fmt: skip


def start(run: Run, folder: Path, resume: bool, validation: torch.Tensor, mask: torch.Tensor) -> None:
    """Bring a run back from its last.pt, or begin it: everything is on the disk before the first step."""
    options = run.options
    if resume and (folder / "last.pt").exists():
        load_everything(folder / "last.pt", run)
        run.options = options  # --epochs may have grown
    if rank_and_world()[0] == 0:
        save_checkpoint(folder / "last.pt", run, everything=True)
        about = describe(run)
        data.save(folder / "config.json", to_json(about))
        if run.rows:
            write_log(folder, run)
        else:
            write_pictures(folder, run, validation, mask, best=True)
        done = ", all epochs done" if run.epoch == options["epochs"] else ""
        print(f"{folder}: {run.setting[1]} pictures to train on, {len(validation)} to validate, on {about['device']}, {about['precision']}{done}"
              f"{f', {run.setting[0]} processes' if run.setting[0] > 1 else ''}", flush=True)  # fmt: skip


def train(options: dict, folder: Path, resume: bool, device: torch.device, compiled: bool = False) -> dict:
    """A whole run, from its folder to its results; goes on from last.pt if `resume`."""
    rank, world = rank_and_world()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    run = build(options, device, compiled)
    if rank == 0 and not resume:
        folder.mkdir(parents=True, exist_ok=True)
        data.save(folder / "config.json", to_json(describe(run)))
    training, validation = load_split(options)
    mask = data.center_hole(options["res"], options["hole"]).to(device)
    run.setting = [world, len(training)]
    start(run, folder, resume, validation, mask)
    batch = min(options["batch"], len(training) // world)
    training = data.settle(training, device)
    while run.epoch < options["epochs"]:
        began = time.time()
        means = train_epoch(run, training, batch)
        seconds = time.time() - began
        for network in filter(None, (run.generator, run.discriminator, run.ema)):
            average_buffers(network)
        run.epoch += 1
        if rank == 0:
            images = len(training) // world // batch * batch * world
            past = run.rows[-1]["seconds"] if run.rows else 0
            row = {"epoch": run.epoch, "step": run.step, "seconds": past + seconds, "images_per_second": images / seconds}
            finish_epoch(run, folder, row | means, validation, mask)
        wait_for_all()
    if rank == 0:
        write_gif(folder)
    return run.best


# --- Evaluating -----------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    """Print, and perhaps write, the metrics of a checkpoint; resolution, hole, data and split are its own unless given."""
    run = load_painter(args.evaluate, choose_device(args.device))
    given = {name: getattr(args, name) for name in ("res", "hole", "data", "val", "precision")}
    run.options |= {name: value for name, value in given.items() if value is not None}
    check_options(run.options | {"val": 0.5})
    if args.json and not Path(args.json).parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {Path(args.json).parent}; make it first")
    if args.json and Path(args.json).exists() and not Path(args.json).is_file():
        raise InputError(f"--json {args.json} is no file that can be replaced: name another")
    pixels = data.split(load_pixels(run.options), run.options["val"])[1]
    if not len(pixels):
        raise InputError(f"--val {run.options['val']} of --data {run.options['data']} leaves no picture to measure: give more of them")
    mask = data.center_hole(run.options["res"], run.options["hole"]).to(run.device)
    result = validate(lambda image: paint(run, image, mask), pixels, mask) | {"epoch": run.epoch}
    print("\n".join(f"{name:<14}{value:.4f}" if isinstance(value, float) else f"{name:<14}{value}" for name, value in result.items()))
    if args.json:
        data.save(args.json, to_json(result))


# --- Comparing: table 1 and figure 4 --------------------------------------------------------------

# name, what to train, the PSNR that the paper prints
ROWS = [
    ("U-Net", {"model": "unet", "loss": "l1", "act": "relu"}, 6.178),
    ("U-Net", {"model": "unet", "loss": "l1", "act": "swish"}, 6.093),
    ("U-Net", {"model": "unet", "loss": "l1+dssim", "act": "relu"}, 6.178),
    ("U-Net", {"model": "unet", "loss": "l1+dssim", "act": "swish"}, 6.065),
    ("GAN", {"model": "gan", "loss": "adversarial", "act": "relu"}, 6.153),
    ("GAN", {"model": "gan", "loss": "adversarial", "act": "swish"}, 6.069),
    ("GAN + L1", {"model": "gan", "loss": "100*l1+adversarial", "act": "relu"}, None),
    ("U-Net, 1 deeper", {"model": "unet", "loss": "l1", "act": "relu", "depth": DEFAULTS["unet"]["depth"] + 1}, None),
]
COLUMNS = ["network", "loss", "activation", "parameters", "minutes", "psnr_output", "psnr_hole", "psnr_restored", "ssim_restored", "paper"]


def methods_without_training(training: torch.Tensor, mask: torch.Tensor) -> dict:
    """{name: painter(images)}: what there is to beat."""
    mean = models.mean_face(training).to(mask.device)
    return {
        "white hole": lambda image: data.damage(image, mask),
        "harmonic diffusion": lambda image: models.harmonic(data.damage(image, mask), mask),
        "mean face": lambda image: mean.expand_as(image),
        "nearest face": lambda image: models.nearest_face(image, mask, training),
    }


def compare_options(args: argparse.Namespace, row: dict, seed: int) -> dict:
    """The options of one row of the table."""
    asked = argparse.Namespace(**vars(args) | {name: row[name] for name in ("model", "loss", "act", "depth") if name in row})
    asked.res, asked.seed, asked.epochs = args.res or 64, seed, args.epochs or DEFAULTS["unet"]["epochs"]
    return training_options(asked)


def compare(args: argparse.Namespace) -> None:
    """Train every row that is not finished, and write table.md, table.csv and comparison.png below --out."""
    out, device, first = Path(args.out or "runs/compare"), choose_device(args.device), args.seed or 0
    check_writable(out)
    fits = int(math.log2(args.res or 64))  # as deep as a U-Net can be
    table = [{"network": name, "paper": paper, "runs": []} | row for name, row, paper in ROWS if row.get("depth", 0) <= fits]
    work, finished = [], set()
    for seed, row in itertools.product(range(first, first + (args.seeds or 1)), table):
        options = compare_options(args, row, seed)
        folder = out / f"{Path(default_folder(options)).name}-depth{options['depth']}-seed{seed}"
        if (folder / "last.pt").exists():
            state = read_checkpoint(folder / "last.pt", torch.device("cpu"))
            check_same(options, state["options"], folder, "give the options of the first time again, or another --out")
            if state["epoch"] == options["epochs"]:
                finished.add(folder)
        work.append((row, options, folder))
    work.sort(key=lambda job: job[2] not in finished)  # until those are read, the table of the last time stays
    training, validation = load_split(options)
    mask = data.center_hole(options["res"], options["hole"]).to(device)
    image = validation[:6].to(device).float() / 255
    say_line("| " + " | ".join(COLUMNS) + " |")
    for name, painter in methods_without_training(training, mask).items():
        began = time.time()
        result = validate(painter, validation, mask) | {"minutes": (time.time() - began) / 60, "parameters": 0}
        table.append({"network": name, "loss": "", "act": "", "paper": None, "runs": [result], "faces": restore(painter(image), image, mask)})
        say_row(table[-1])
    for row, options, folder in work:
        train(options, folder, (folder / "last.pt").exists(), device, args.compile)
        wait_for_all()
        run = load_painter(folder / "best.pt", device)
        parameters = sum(weight.numel() for weight in run.generator.parameters())
        state = read_checkpoint(folder / "last.pt", torch.device("cpu"))
        row["runs"].append(state["best"] | {"parameters": parameters, "minutes": state["rows"][-1]["seconds"] / 60})
        row.setdefault("faces", restore(paint(run, image, mask), image, mask))
        say_row(row)
        if folder not in finished or folder == work[-1][2]:
            write_table(out, table)
    strips = [("original", image), ("damaged", data.damage(image, mask))]
    for row in table:
        lines = [row["network"], row["loss"].replace("+", " +\n"), row["act"]] if row["loss"] else row["network"].split()
        strips.append(("\n".join(lines), row["faces"]))
    if rank_and_world()[0] == 0:
        data.save(out / "comparison.png", data.png(data.grid(strips, upright=True)))
        print(f"{out}/table.md and {out}/comparison.png are written")


def table_row(row: dict) -> dict:
    """A row of the table as text: mean, and ± standard deviation if there are several runs."""
    cells = {"network": row["network"], "loss": row["loss"], "activation": row["act"]}
    for name in COLUMNS[3:-1]:
        values = [run[name] for run in row["runs"]]
        digits = {"parameters": 0, "minutes": 1, "ssim_restored": 4}.get(name, 2)
        cells[name] = f"{statistics.mean(values):,.{digits}f}"
        if len(values) > 1 and digits and name != "minutes":
            cells[name] += f" ± {statistics.stdev(values):.{digits}f}"
    return cells | {"paper": f"{row['paper']:.3f}" if row["paper"] else ""}


def say_line(line: str) -> None:
    """A line on the screen, from the first process only."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


def say_row(row: dict) -> None:
    """A row of the table on the screen."""
    say_line("| " + " | ".join(table_row(row).values()) + " |")


def write_table(out: Path, table: list[dict]) -> None:
    """table.md and table.csv with the rows that have a run."""
    if rank_and_world()[0] == 0:
        rows = [table_row(row) for row in table if row["runs"]]
        lines = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *(row.values() for row in rows))]
        data.save(out / "table.md", ("\n".join(lines) + "\n").encode())
        data.save(out / "table.csv", to_csv(rows))


# --- Restoring your own photo ---------------------------------------------------------------------


def photo_mask(file: str | None, photo: PIL.Image.Image, hole: float) -> torch.Tensor:
    """What is missing from a photo, (1, H, W), 1 in the hole: the mask file, white = missing, or a centred square."""
    width, height = photo.size
    if not file:
        side = max(1, round(min(width, height) * hole))
        top, left, mask = (height - side) // 2, (width - side) // 2, torch.zeros(1, height, width)
        mask[:, top : top + side, left : left + side] = 1
        return mask
    try:
        picture = data.open_photo(file).convert("L")
    except InputError as error:
        raise InputError(f"--mask {file}: {error}") from error
    if abs(picture.width * height - width * picture.height) > max(width, height, *picture.size):  # a pixel's rounding is allowed
        raise InputError(f"--mask {file} is {picture.width} x {picture.height}, the photo {width} x {height}: it takes the same proportions")
    values = np.asarray(picture.resize(photo.size, PIL.Image.Resampling.NEAREST))
    grey = float(((values > 48) & (values < 208)).mean())
    if grey > 0.2:  # a soft brush and a JPEG make some
        raise InputError(f"--mask {file} is {grey:.0%} grey, like a photo: paint white what is to be filled, the rest black")
    mask = torch.from_numpy(values >= 128)[None]
    if mask.all() or not mask.any():
        colour, missing = ("white", "everything") if mask.all() else ("black", "nothing")
        raise InputError(f"--mask {file} is all {colour}, so {missing} is missing: paint white what is to be filled, the rest black")
    return mask.float()


def resize(image: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, S, S) -> (B, C, size, size), smoothly both ways."""
    return torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)


@torch.no_grad()
def fill(run: Run, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Paint the hole of a photo of any size: photo (3, H, W) in [0, 1], mask (1, H, W) -> (3, H, W).

    The network sees the smallest square in which the hole takes the share it was trained on, in the centre; beyond the
    photo's border its last pixels are repeated. What it paints is scaled back. Then the difference at the rim between
    the known pixels and the painted ones, carried on into the hole by Laplace's equation, is added: no step is left there.
    """
    res, (height, width) = run.options["res"], photo.shape[1:]
    rows, columns = mask[0].any(1).nonzero()[:, 0], mask[0].any(0).nonzero()[:, 0]
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    side = math.ceil(max(bottom - top, right - left) * res / round(res * run.options["hole"]))
    y0, x0 = (top + bottom - side) // 2, (left + right - side) // 2
    n = min(side, 8 * res)  # of a huge square every few pixels are enough
    pick = ((torch.arange(n) + 0.5) * side / n).floor().long()
    y, x = (y0 + pick).clamp(0, height - 1), (x0 + pick).clamp(0, width - 1)
    hole = mask[:, y][:, :, x][None]  # (1, 1, n, n)
    share = resize(1 - hole, res)  # how much of each small pixel is known: only that gives it its colour
    small = resize(photo[:, y][:, :, x][None] * (1 - hole), res).div_(share.clamp(min=1e-6)).clamp_(0, 1)
    hole = (share < 0.5).float()
    painted = paint(run, small.to(run.device), hole.to(run.device)).cpu()
    painted = models.harmonic(painted, 1 - hole)  # what lies beyond its hole is carried on from inside
    # Back in the photo: the hole's bounding box, with one known pixel around it where there is one.
    top, bottom, left, right = max(0, top - 1), min(height, bottom + 1), max(0, left - 1), min(width, right + 1)
    down, across = ((torch.arange(*ends) + 0.5 - start) / side * 2 - 1 for ends, start in (((top, bottom), y0), ((left, right), x0)))
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)[None]  # (1, h, w, 2), each from -1 to 1
    painted = torch.nn.functional.grid_sample(painted, places, padding_mode="border", align_corners=False)
    known, hole = photo[None, :, top:bottom, left:right], mask[None, :, top:bottom, left:right]
    joined = painted + models.harmonic((known - painted) * (1 - hole), hole)
    result = photo.clone()
    result[:, top:bottom, left:right] = torch.where(hole > 0, joined.clamp(0, 1), known)[0]
    return result


def restore_photo(run: Run, file: Path, mask_file: str | None, out: Path) -> None:
    """NAME-restored.png and NAME-compare.png in `out`, numbered if they exist; known pixels are the photo's to the bit."""
    photo = data.open_photo(file)
    pixels, mask = data.to_tensor(photo), photo_mask(mask_file, photo, round(run.options["res"] * run.options["hole"]) / run.options["res"])
    image = pixels.float() / 255
    restored = torch.where(mask > 0, fill(run, image, mask).mul(255).round().to(torch.uint8), pixels)
    name, n = file.stem, 1
    while any((out / f"{name}-{kind}.png").exists() for kind in ("restored", "compare")):
        n += 1
        name = f"{file.stem}-{n}"
    picture = data.to_picture(restored)
    profile = photo.info.get("icc_profile") or b""
    picture.info["icc_profile"] = profile if profile[16:20] == b"RGB " else None  # the same colours on the same screen
    out.mkdir(parents=True, exist_ok=True)
    data.save(out / f"{name}-restored.png", data.png(picture))
    parts = {"damaged": data.to_picture(data.damage(image, mask)), "restored": picture} | ({} if mask_file else {"original": photo})
    data.save(out / f"{name}-compare.png", data.png(data.side_by_side(parts)))
    print(out / f"{name}-restored.png", out / f"{name}-compare.png")


def restore_photos(args: argparse.Namespace) -> None:
    """All photos of --restore; those that cannot be read are named at the end, and the others restored all the same.

    In folders, what was restored before is passed over.
    """
    if not args.checkpoint:
        raise InputError("--restore needs --checkpoint: the best.pt of a run folder")
    run, out, broken = load_painter(args.checkpoint, choose_device(args.device)), Path(args.out or "restored"), []
    check_writable(out)
    files = []
    for path in map(Path, args.restore):
        if path.is_dir():
            found = (path / name for name, *_ in data.list_pictures(path))
            files += [file for file in found if not file.stem.endswith(("-restored", "-compare"))]
        else:
            files.append(path)
    if not files:
        raise InputError(f"{' '.join(args.restore)} holds only what was restored before: name photos, or another folder")
    for file in files:
        try:
            restore_photo(run, file, args.mask, out)
        except InputError as error:
            broken.append(f"{file}: {error}")
    if broken:
        raise InputError(f"{len(files) - len(broken)} of {len(files)} photos are restored; " + "; ".join(broken))


# --- The command ----------------------------------------------------------------------------------


@contextlib.contextmanager
def processes(device_name: str):
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = choose_device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


TRAINED = {"model", "lr", *COMMON, *DEFAULTS["unet"]}  # the options that decide what is trained
USES = {  # what each job makes use of
    "train": TRAINED | {"compile", "out", "resume"},
    "compare": TRAINED - {"model", "act", "loss", "depth"} | {"compare", "compile", "out", "seeds"},
    "evaluate": {"evaluate", "json", "res", "hole", "data", "val", "precision"},
    "restore": {"restore", "checkpoint", "mask", "out"},
}


def choose_job(args: argparse.Namespace) -> str:
    """Which of the four is asked for; InputError for two at once, or for an option that would do nothing."""
    given = [name for name, value in vars(args).items() if name != "device" and value is not None and value is not False]
    jobs = [name for name in given if name in USES] or ["train"]
    if len(jobs) > 1:
        raise InputError(f"--{jobs[0]} and --{jobs[1]} are two jobs: give one of them")
    job = jobs[0]
    for name in given:
        if name not in USES[job]:
            flag, place = "--" + name.replace("_", "-"), "in a training" if job == "train" else f"with --{job}"
            add = "".join(f", or add --{other}" for other in USES if job == "train" and name in USES[other])
            raise InputError(f"{flag} does nothing {place}: leave it out{add}")
    return job


def data_path(text: str) -> str:
    """--data as a run keeps it: absolute, so that it can go on from anywhere; 'synthetic' means the faces that are drawn."""
    if text == "synthetic" and not Path(text).exists():
        return text
    if text in ("", "synthetic"):
        raise InputError(f"--data {text!r}: give the path of a folder or zip (./synthetic for a folder of that name), or leave it out for faces that are drawn")
    return os.path.abspath(text)


def train_command(args: argparse.Namespace) -> None:
    """Train a new run, or go on with one."""
    rank, world = rank_and_world()
    chosen = [choose_folder(args) if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(chosen)
    folder, made = chosen[0]
    args.out = folder  # for the message after Ctrl-C
    try:
        options = stored_options(folder, args) if args.resume else training_options(args)
        if args.hole_weight is not None and not {"l1", "mse"} & set(losses.parse_loss(options["loss"])):
            raise InputError(f"--hole-weight does nothing with --loss {options['loss']}: it counts in l1 and mse only, leave it out")
        best = train(options, folder, args.resume, choose_device(args.device), args.compile)
    except Exception:
        if rank == 0 and not args.resume and not (folder / "last.pt").exists():  # a mistake leaves nothing behind
            (folder / "config.json").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in made:
                    path.rmdir()
        raise
    say_line(f"{folder}/grid.png shows the faces; psnr_hole {best['psnr_hole']:.2f}, psnr_output {best['psnr_output']:.2f} dB" if rank == 0 else "")


def main(argv: list[str] | None = None) -> None:
    """The program: a mistake of the user ends in one line and exit code 2, Ctrl-C in 130."""
    args = parser().parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have characters that the screen has not
    try:
        job = choose_job(args)
        if args.data is not None:
            args.data = data_path(args.data)
        with processes(args.device) if job in ("train", "compare") else contextlib.nullcontext():
            {"train": train_command, "compare": compare, "evaluate": evaluate, "restore": restore_photos}[job](args)
    except InputError as error:
        stop(str(error), 2)
    except OSError as error:
        stop(f"cannot read or write ({error}): what was saved before is whole; make room, or see who may read and write there", 2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|not enough memory", str(error)):
            stop("out of memory: try a smaller --batch, --width or --res", 2)
        if args.compile and type(error).__module__.startswith("torch._"):
            stop(f"--compile failed ({str(error).splitlines()[0]}): leave it out, or install a C++ compiler", 2)
        raise
    except KeyboardInterrupt:
        training = not args.compare and args.out and Path(args.out, "config.json").exists()
        resume = f"from the last epoch with: python inpaint.py --resume --out {shlex.quote(str(args.out))}"
        stop("stopped; go on " + (resume if training else "with the same command"), 130)


def stop(message: str, code: int) -> None:
    """One line on stderr, and the exit code."""
    data.progress(None)
    print("inpaint.py: " + re.sub(r"\s+", " ", message), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
