"""File 4 of 4, inpaint.py: train, measure, compare, restore (paper, sections 2.5, 3 and 4).

    python inpaint.py --model gan --act relu --res 64                        a GAN, on drawn faces
    python inpaint.py --model unet --data img_align_celeba.zip               a U-Net, on CelebA
    python inpaint.py --resume runs/NAME                                     go on with a run that was stopped
    python inpaint.py --evaluate runs/NAME/generator.pt > results.json       measure it again
    python inpaint.py --restore me.jpg --checkpoint runs/NAME/generator.pt   your own photo
    python inpaint.py --compare --data img_align_celeba.zip                  the paper's table 1 and figure 4
    torchrun --nproc-per-node 4 inpaint.py --model unet ...                  several GPUs

What you learn here: the training step of a U-Net and of a GAN, and how it is repeated and checked.

    the lesson    the recipes; what is trained, and the step; an epoch; validation
    plumbing      a run and its folder; several processes; evaluating; comparing; restoring; the command
"""

import argparse
import contextlib
import copy
import datetime
import functools
import gc
import io
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import losses
import models
from data import InputError

# The recipes: the paper's two networks as we train them, and what both have in common. These are the values
# of all options that are not given.
RECIPES = {
    "unet": {
        "res": 128, "depth": 5, "width": 32, "limit": 2, "lr": 3e-3,
        "loss": "l1",
    },
    "gan": {
        "res": 64, "depth": 4, "width": 24, "limit": 16, "lr": 1e-3,
        "loss": "200*l1+adversarial+24*features",
    },
}  # fmt: skip
DEFAULTS = {
    "act": "relu",  # or swish
    "hole_weight": 10.0,  # l1 and mse count a pixel of the hole ten times: it is what a user sees
    "judge": "middle",  # of the restored picture; or all of the restored picture, or the output
    "augment": "color+shift",  # or none
    "data": "synthetic", "hole": 0.3, "wild": False, "val": 0.2,
    "epochs": 12, "batch": 8, "seed": 0, "precision": "auto",
}  # fmt: skip
TRAINING = ("model", *RECIPES["unet"], *DEFAULTS)  # all options that decide what is trained
WEIGHT_DECAY = {"unet": 0.05, "gan": 0.0}  # a little against overfitting; DCGAN has none
DISCRIMINATOR_RATE = 2e-4  # DCGAN's; a discriminator that learns faster wins before the generator can paint
SMOOTH = 0.1  # the target for real pictures is 0.9, so that the discriminator is never certain

# --- What is trained, and the step ----------------------------------------------------------------


class Run:
    """What a run is made of: its options, networks, averaged generator, optimisers, counters and log.

    `--model` says how the first weights are drawn from the seed, PyTorch's way or DCGAN's, and how much they
    are pulled to 0. The loss decides whether there is a discriminator. `ema` is the averaged generator (an
    exponential moving average), which is what a user gets.
    """

    def __init__(self, options: dict, device: torch.device, pictures: int = 0):
        self.options = options
        self.device = device
        self.pictures = pictures  # in the data set, to know it again
        self.mask = data.center_hole(options["res"], options["hole"]).to(device)
        self.step = 0
        self.epoch = 0
        self.log = []  # a row for each epoch
        self.film = {}  # epoch: three restored faces, uint8 (3, 3, res, res)
        self.told = None  # how well a fresh network tells what is painted, at the end
        self.loss_weights = losses.parse_loss(options["loss"])
        torch.manual_seed(options["seed"])
        self.networks = {"generator": self.prepare(build_generator(options))}
        self.networks["generator"].start_by_keeping()  # again, because DCGAN's start is drawn over it
        if "adversarial" in self.loss_weights:
            side = options["res"] // 2 if options["judge"] == "middle" else options["res"]
            self.networks["discriminator"] = self.prepare(models.Discriminator(side, options["width"]))
        self.ema = copy.deepcopy(self.networks["generator"]).eval().requires_grad_(False)
        decay = WEIGHT_DECAY[options["model"]]
        adam = {"betas": (0.5, 0.999), "weight_decay": decay, "fused": device.type != "mps"}
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), **adam) for name, network in self.networks.items()
        }
        # Weights and batch norm's statistics: the networks' own tensors, which change in place.
        self.current = floats(self.networks["generator"])
        self.averages = floats(self.ema)
        # What the step calls: the same networks, or under torchrun PyTorch's wrappers around them.
        self.generator = self.networks["generator"]
        self.discriminator = self.networks.get("discriminator")

    def prepare(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with the first weights that `--model` asks for, on the device."""
        if self.options["model"] == "gan":
            models.dcgan_init(network)
        return network.to(self.device, memory_format=data.memory_format(self.device))


def floats(network: torch.nn.Module) -> list[torch.Tensor]:
    """All real-valued tensors of a network, in order."""
    return [value for value in network.state_dict().values() if value.is_floating_point()]


def build_generator(options: dict) -> models.UNet:
    """The U-Net of these options, with fresh weights."""
    return models.UNet(options["depth"], options["width"], options["act"], options["limit"])


def training_step(run: Run, image: torch.Tensor, mask: torch.Tensor, looks: torch.Tensor) -> dict:
    """Damage, paint, judge, update: image (B, 3, H, W), mask (B or 1, 1, H, W) -> {name: what is logged, ()}.

    looks (B, 3, 5), uniform in [0, 1), say how a picture is changed when the discriminator looks at it: real
    and fake in (1), both alike in (2). Nothing here waits for the device: the numbers are tensors until
    somebody reads them.
    """
    options = run.options
    terms, report = {}, {}
    damaged = data.damage(image, mask)
    with autocast(run.device, options["precision"]):
        output = run.generator(damaged, mask)  # (B, 3, H, W), the whole picture
    if run.discriminator:
        fake = output if options["judge"] == "output" else data.paste(output, image, mask)
        # (1) The discriminator: a high D(real), a low D(fake). The generator is left out: detach.
        report = teach_discriminator(run, image, fake.detach(), looks)
        # (2) The generator: a high D(fake), judged anew. The discriminator's weights are left out.
        terms = ask_discriminator(run, image, fake, looks[:, 2])
    # With any network: minimise the distance from the original too, if the loss has one.
    terms |= losses.distances(run.loss_weights, output, image, mask, options["hole_weight"])
    update(run.optimizers["generator"], sum(run.loss_weights[name] * term for name, term in terms.items()))
    update_ema(run.averages, run.current, run.step)
    run.step += 1
    return {name: value.detach() for name, value in (terms | report).items()}


def teach_discriminator(run: Run, real: torch.Tensor, fake: torch.Tensor, looks: torch.Tensor) -> dict:
    """A step of the discriminator: pictures (B, 3, H, W), looks (B, 3, 5) -> {name: what is logged, ()}."""
    real = seen(run.options, real, looks[:, 0])
    fake = seen(run.options, fake, looks[:, 1])
    with autocast(run.device, run.options["precision"]):
        real_logit, _ = run.discriminator(real)  # (B,); each kind in a batch of its own, as in DCGAN
        fake_logit, _ = run.discriminator(fake)
    loss = losses.discriminator_loss(real_logit, fake_logit, SMOOTH)
    update(run.optimizers["discriminator"], loss)
    return {"d_loss": loss, "D(real)": real_logit.sigmoid().mean(), "D(fake)": fake_logit.sigmoid().mean()}


def ask_discriminator(run: Run, real: torch.Tensor, fake: torch.Tensor, look: torch.Tensor) -> dict:
    """What the discriminator says of the fake: the terms that it gives to the loss -> {term: value ()}."""
    # Its weights need no gradient, so it is called without torchrun's wrapper, which would wait for one.
    discriminator = run.networks["discriminator"].requires_grad_(False)
    fake = seen(run.options, fake, look)
    with autocast(run.device, run.options["precision"]):
        fake_logit, fake_features = discriminator(fake)
    terms = {"adversarial": losses.generator_loss(fake_logit)}
    if "features" in run.loss_weights:
        real = seen(run.options, real, look)  # changed by the same numbers, so that the features compare
        with autocast(run.device, run.options["precision"]):
            _, real_features = discriminator(real)
        terms["features"] = losses.feature_loss(fake_features, real_features)
    discriminator.requires_grad_(True)  # what counts is how it stood when it was called
    return terms


def seen(options: dict, picture: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """What the discriminator sees of a picture, real or fake (B, 3, H, W).

    All of it or the middle, as it is or changed, as look (B, 5) says. With --judge output a fake is the whole
    output, else the restored picture.
    """
    if options["judge"] == "middle":
        picture = models.middle(picture)
    if options["augment"] == "color+shift":
        picture = models.augment(picture, look)
    return picture


def autocast(device: torch.device, precision: str):
    """A context in which networks run in bfloat16, if that is the precision ("auto" is decided by now).

    Losses stay outside.
    """
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down the gradient of the loss. Gradients add up, so those of the last step go first."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update_ema(averages: list[torch.Tensor], current: list[torch.Tensor], step: int) -> None:
    """average <- d * average + (1 - d) * current, in place; d = min(0.999, (n + 1) / (n + 10)) at step n.

    A mean over about the last ninth of the steps so far, 1,000 at most. The noise of single steps cancels in
    it, as at a lower learning rate.
    """
    decay = min(0.999, (step + 1) / (step + 10))
    get_ema_multi_avg_fn(decay)(averages, current, step)


# --- An epoch -------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():  # some builds of PyTorch have no torch.distributed
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def draw_epoch(options: dict, epoch: int, count: int, take: int) -> tuple[torch.Tensor, ...]:
    """The random choices of one epoch: order, mirrored or not, the discriminator's looks, holes, framing.

    Seed, epoch and process decide them. All processes have the same shuffled order, from which each takes its
    own pictures, `take` of them. Holes and framing are for --wild.
    """
    rank, world = rank_and_world()
    seed = options["seed"] * 1_000_003 + epoch
    shared = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=shared)[rank::world][:take]
    own = torch.Generator().manual_seed(seed * 1009 + rank)
    flip = torch.rand(take, generator=own) < 0.5
    boxes = torch.empty(0)  # without --wild, the hole is where it always is
    if options["wild"]:
        boxes = data.random_boxes(take, options["res"], options["hole"], own)
    looks = torch.rand(take, 3, 5, generator=own)
    framing = torch.rand(take, 5, generator=own)
    return order, flip, looks, boxes, framing


def learning_rate(highest: float, step: int, total: int) -> float:
    """Rises in a straight line to `highest` over the first tenth of all steps, then falls in another to 0.

    Fresh weights get small steps first. At the end, small steps let the run converge (section 2.5).
    """
    return highest * min(1, (step + 1) / max(1, 0.1 * total), (total - step) / (0.9 * total))


def train_epoch(run: Run, training: torch.Tensor) -> dict[str, float]:
    """All batches of one epoch -> its speed, and the means of what training_step reports."""
    options = run.options
    rank, world = rank_and_world()
    here = len(training) // world  # pictures for this process
    batch = min(options["batch"], here)
    steps = here // batch
    total = options["epochs"] * steps
    order, flip, *chances = draw_epoch(options, run.epoch, len(training), steps * batch)
    looks, boxes, framing = (chance.to(run.device) for chance in chances)  # once, so that no step waits
    highest = {"generator": options["lr"], "discriminator": DISCRIMINATOR_RATE}
    sums = {}
    began = last_look = time.perf_counter()
    for i, image in enumerate(data.batches(training, batch, order, flip, run.device)):
        for name, optimizer in run.optimizers.items():
            rate = learning_rate(highest[name], run.epoch * steps + i, total)
            optimizer.param_groups[0]["lr"] = rate
        part = slice(i * batch, (i + 1) * batch)
        mask = run.mask
        if options["wild"]:
            image = data.frame(image, framing[part])
            mask = data.box_mask(boxes[part], options["res"])
        report = training_step(run, image, mask, looks[part])
        sums = {name: sums.get(name, 0) + value for name, value in report.items()}
        if rank == 0 and time.perf_counter() - last_look > 1:
            check_finite(run, sums)
            last_look = time.perf_counter()
            speed = (i + 1) * batch * world / (last_look - began)
            left = data.time_left((total - run.epoch * steps - i - 1) * batch * world, speed)
            place = f"epoch {run.epoch + 1}/{options['epochs']}  step {i + 1}/{steps}"
            data.progress(f"{place}  {speed:.0f} images/s  {in_words(sums, i + 1)}{left}")
    check_finite(run, sums)
    for network in (*run.networks.values(), run.ema):
        check_finite(run, {f"a weight ({name})": value.sum() for name, value in network.state_dict().items()})
    speed = steps * batch * world / (time.perf_counter() - began)
    return {"images_per_second": speed} | {name: float(value) / steps for name, value in sums.items()}


def in_words(sums: dict, count: int) -> str:
    """The means of what is logged, for the screen."""
    return "  ".join(f"{name} {float(value) / count:.4f}" for name, value in sums.items())


def check_finite(run: Run, numbers: dict[str, torch.Tensor]) -> None:
    """InputError naming the first number that is not finite any more."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            where = f"{name} is {float(value)} in epoch {run.epoch + 1}, before step {run.step}"
            advice = f"in a new run, try --lr {run.options['lr'] / 4:g} or --precision float32"
            raise InputError(f"{where}: the last epoch is kept; {advice}")


# --- Validation -----------------------------------------------------------------------------------

METRICS = (*losses.PER_PICTURE, "swd_hole")


@torch.no_grad()
def run_ema(ema: models.UNet, damaged: torch.Tensor, mask: torch.Tensor, options: dict) -> torch.Tensor:
    """What the averaged generator, in evaluation mode, paints for damaged pictures (B, 3, H, W)."""
    with autocast(damaged.device, options["precision"]):
        return ema(damaged.contiguous(memory_format=data.memory_format(damaged.device)), mask)


def validate(painter, pixels: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """All METRICS over a validation set, uint8 (N, 3, res, res): losses.measure's means, and swd_hole.

    (`measure` scores a few pictures, `validate` a whole set, and `evaluate` is what --evaluate does.)
    `painter(damaged)` -> output (B, 3, res, res): run_ema with a network, or a method without one. The hole
    is always the mask's, also with --wild. swd_hole looks at the first 800 pictures at 64 px, 200 at 128.
    """
    values, kept = [], []
    for image, output, restored in painted(painter, pixels, mask):
        values.append(losses.measure(output, restored, image, mask))
        if len(kept) < 8:
            kept.append((restored, image))
    result = dict(zip(losses.PER_PICTURE, torch.cat(values, 1).cpu().double().mean(1).tolist()))
    restored, image = (torch.cat(parts) for parts in zip(*kept))
    result["swd_hole"] = losses.swd(restored, image, mask)
    return result | {"pictures": len(pixels)}


def painted(painter, pixels: torch.Tensor, mask: torch.Tensor):
    """Yield (image, output, restored), (B, 3, res, res) each, for all pictures, a part at a time."""
    count = max(1, 100 * 64**2 // pixels.shape[2] ** 2)  # 100 at 64 px, and as much memory at any resolution
    for part in pixels.split(count):
        image = data.to_float(part, mask.device)
        output = painter(data.damage(image, mask))
        yield image, output, data.paste(output, image, mask)


def tell(painter, pixels: torch.Tensor, mask: torch.Tensor) -> float | None:
    """`told`: the share of pictures that a fresh discriminator tells right, restored or original.

    0.5 is guessing. It learns from seven tenths of the validation set, uint8 (N, 3, res, res), or of its
    first 2,000 pictures, and is tested on the others: a classifier two-sample test (Lopez-Paz and Oquab
    2017). It sees the middle at half size: no generator paints the grain of a photograph, which is gone
    there. None with fewer than 200 pictures, from which it would learn too little. Always the same random
    numbers.
    """
    if len(pixels) < 200:
        data.say(f"told is left out: {len(pixels)} pictures are too few, it takes 200")
        return None
    parts = []
    for image, _, restored in painted(painter, pixels[:2000], mask):
        parts.append([F.avg_pool2d(models.middle(picture), 2) for picture in (image, restored)])
    real, fake = map(torch.cat, zip(*parts))
    count = round(0.7 * len(real))  # to learn from
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        discriminator = models.Discriminator(real.shape[-1], width=32).to(mask.device)
        adam = torch.optim.AdamW(discriminator.parameters(), weight_decay=0.05)
        batches = [chosen for _ in range(6) for chosen in torch.randperm(count).split(16)]
        flips = torch.rand(len(batches)) < 0.5
    for step, (chosen, flip) in enumerate(zip(batches, flips.tolist())):
        data.progress(f"a fresh discriminator learns: step {step + 1}/{len(batches)}")
        adam.param_groups[0]["lr"] = learning_rate(1e-3, step, len(batches))
        # In one batch, as they are in the test: there, batch norm's statistics are those of both kinds.
        pictures = torch.cat([real[chosen], fake[chosen]])
        logit, _ = discriminator(pictures.flip(3) if flip else pictures)
        update(adam, losses.discriminator_loss(*logit.chunk(2)))
    data.progress(None)
    discriminator.eval()
    with torch.no_grad():
        right = torch.cat([discriminator(real[count:])[0] > 0, discriminator(fake[count:])[0] <= 0])
    return right.float().mean().item()


# --- A run and its folder -------------------------------------------------------------------------

KIND = "face inpainting checkpoint, version 4"
COUNTED = ("step", "epoch", "log", "film", "told")  # what a run adds to its networks and options
BOUNDS = {  # the least and the greatest value of an option
    "hole_weight": (1e-3, 1e6), "depth": (1, 9), "width": (1, 1024), "limit": (1, 256), "hole": (1e-6, 1),
    "val": (1e-6, 1), "epochs": (1, 10**6), "batch": (1, 10**6), "lr": (1e-12, 10), "seed": (0, 2**31),
}  # fmt: skip


def check_options(options: dict) -> None:
    """InputError for a number out of its bounds (nan too), an unknown loss, or options that do not fit."""
    for name, (low, high) in BOUNDS.items():
        if not low <= options[name] <= high:
            given = f"{flag(name)} {options[name]}"
            raise InputError(f"{given} will not do: it takes a number from {low:,} to {high:,}")
    try:
        losses.parse_loss(options["loss"])
    except ValueError as error:
        raise InputError(f"--loss {options['loss']}: {error}") from error
    res, depth, hole = options["res"], options["depth"], options["hole"]
    side = round(res * hole)
    if not 1 <= side < res:
        size = f"--hole {hole} of --res {res} is {side} pixels wide"
        raise InputError(f"{size}: it must hide some and leave some")
    if 2**depth > res:
        most = int(math.log2(res))
        raise InputError(f"--depth {depth} halves --res {res} below a pixel: at most {most} fit")


def flag(name: str) -> str:
    """hole_weight -> --hole-weight."""
    return "--" + name.replace("_", "-")


def load_data(options: dict, least: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part) of --data, uint8 (N, 3, res, res).

    InputError if there are fewer than `least` pictures to train on, or none to validate.
    """
    with first_process_first():  # the others find its cache
        if options["data"] == "synthetic":
            pixels = data.synthetic_faces(data.SYNTHETIC, options["res"])
        else:
            pixels = data.load_images(options["data"], options["res"])
    training, validation = data.split(pixels, options["val"])
    if len(training) < least or not len(validation):
        parts = f"{len(training)} to train on and {len(validation)} to validate"
        source = f"--val {options['val']} of the {len(pixels)} pictures in --data {options['data']}"
        raise InputError(f"{source} leaves {parts}: it takes at least {least} and 1")
    return training, validation


def read_checkpoint(path: str | Path, device: torch.device = torch.device("cpu")) -> dict:
    """The dictionary of a generator.pt or last.pt, in which "ema" is the network, ready to paint.

    InputError for any other file, and for a damaged one. It runs no code.
    """
    resume = Path(path).name == "last.pt"
    advice = "give the folder of a run" if resume else "give the generator.pt of a run"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns about unknown files, and then it fails
            state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        if state["kind"] != KIND:
            raise ValueError("another kind of file")
        check_options(state["options"])
        ema = build_generator(state["options"]).eval().requires_grad_(False)
        ema.load_state_dict(state["ema"])
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} is no checkpoint of this program, or damaged: {advice}") from error
    return state | {"ema": ema.to(device, memory_format=data.memory_format(device))}


def begin(folder: Path | None, options: dict, device: torch.device, pictures: int) -> Run:
    """The run in a folder as its last.pt has it, or with fresh weights if there is none.

    InputError if the file is damaged, or if options, pictures or processes are not those that it had. Only
    the place of the data may differ, and the number of epochs, which may grow.
    """
    path = folder and folder / "last.pt"
    if path is None or not path.exists():
        return Run(options | {"precision": choose_precision(options["precision"], device)}, device, pictures)
    state = read_checkpoint(path, device)
    stored = state["options"]
    free = ("data", "epochs") if options["epochs"] > stored["epochs"] else ("data",)
    refuse_changes(options, stored, free, path)
    choose_precision(stored["precision"], device)
    run = Run(options | {"precision": stored["precision"]}, device, pictures)
    run.ema.load_state_dict(state["ema"].state_dict())
    try:
        for name, network in run.networks.items():
            network.load_state_dict(state[name])
            run.optimizers[name].load_state_dict(state["optimizers"][name])
            run.optimizers[name].param_groups[0]["fused"] = device.type != "mps"  # it may be another device's
        for name in COUNTED:
            setattr(run, name, state[name])
        had = {"pictures": state["pictures"], "processes": state["processes"]}
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not all that a run needs, or damaged: start a new run") from error
    rank, world = rank_and_world()
    if had["pictures"] != pictures:
        given = f"--data {options['data']} holds {pictures} pictures"
        raise InputError(f"{given}, the run in {folder} had {had['pictures']}: give the same pictures")
    if run.epoch < options["epochs"] and had["processes"] != world:
        before = f"the run in {folder} had {had['processes']} processes"
        raise InputError(f"{before}, now there are {world}: start it as before")
    if rank == 0 and run.epoch > 0 and options["epochs"] > stored["epochs"]:
        rate = learning_rate(options["lr"], run.epoch, options["epochs"])
        low = "it had nearly reached 0" if run.epoch == stored["epochs"] else "it was lower"
        data.say(f"{folder}: with more epochs, the learning rate is {rate:.2g} again; {low}")
    return run


def refuse_changes(options: dict, stored: dict, free: tuple, path: str | Path) -> None:
    """InputError naming the first option that differs from the stored one.

    Options in `free` may differ, and auto is as it was.
    """
    for name, value in options.items():
        if name not in free and value not in (stored[name], "auto"):
            given, other = f"{flag(name)} {value}", f"{flag(name)} {stored[name]}"
            raise InputError(f"{given} contradicts {other} of {path}: leave it out, or start a new run")


def save_run(folder: Path, run: Run) -> None:
    """Write what must not be lost: last.pt, all that a resume needs, and generator.pt, to paint with.

    Tensors and plain types only. There is no random state to keep: `draw_epoch` makes that of an epoch from
    the seed and its number.
    """
    weights = {"kind": KIND, "options": run.options, "ema": run.ema.state_dict()}
    everything = weights | {"pictures": run.pictures, "processes": rank_and_world()[1]}
    everything |= {name: getattr(run, name) for name in COUNTED}
    everything |= {name: network.state_dict() for name, network in run.networks.items()}
    everything["optimizers"] = {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}
    for name, state in (("last.pt", everything), ("generator.pt", weights)):
        with data.whole_file(folder / name) as stream:
            torch.save(state, stream)


def show_run(folder: Path, run: Run, validation: torch.Tensor) -> None:
    """Write what shows the run: grid.png, results.json, log.csv, curves.png and at the end training.gif.

    A file that cannot be written is a warning: the weights are safe already.
    """
    image = data.to_float(validation[:8], run.device)
    damaged = data.damage(image, run.mask)
    output = run_ema(run.ema, damaged, run.mask, run.options)
    restored = data.paste(output, image, run.mask)
    faces = [("damaged", damaged), ("output", output), ("restored", restored), ("original", image)]
    keep_in_film(run, restored[:3])
    contents = {"grid.png": data.png(data.grid(faces)), "results.json": data.to_json(describe(run))}
    contents |= {"log.csv": data.to_csv(run.log), "curves.png": data.png(draw_curves(run))}
    if run.epoch == run.options["epochs"]:
        start = F.interpolate(damaged[:3], run.film[run.epoch].shape[-1], mode="area")
        film = {0: start} | run.film
        pictures = [data.grid([(f"epoch {epoch:04d}", faces)]) for epoch, faces in film.items()]
        contents["training.gif"] = data.gif(pictures)
    for name, content in contents.items():
        try:
            data.save(folder / name, content)
        except OSError as error:
            again = "the next epoch, or --resume, tries again"
            data.say(f"warning: {folder / name} cannot be written ({error.strerror}): {again}")


def keep_in_film(run: Run, faces: torch.Tensor) -> None:
    """Add three restored faces (3, 3, res, res) to the film, in which at most 60 epochs stand, evenly."""
    step = math.ceil(run.options["epochs"] / 60)
    small = F.interpolate(faces, min(128, run.options["res"]), mode="area")
    past = {epoch: then for epoch, then in run.film.items() if epoch < run.epoch and epoch % step == 0}
    run.film = past | {run.epoch: small.mul(255).round().to(torch.uint8).cpu()}


def describe(run: Run) -> dict:
    """results.json: the metrics of the last epoch, every option, versions, device, parameter counts."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": np.__version__, "pillow": PIL.__version__}
    measured = {name: run.log[-1][name] for name in ("epoch", *METRICS, "pictures")}
    if run.told is not None:
        measured["told"] = run.told
    return measured | {
        "options": run.options,
        "versions": versions,
        "device": device_name(run.device),
        "processes": rank_and_world()[1],
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in run.networks.items()},
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of processor."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_name() if on_gpu else f"{device.type} {platform.machine()}"


def draw_curves(run: Run) -> PIL.Image.Image:
    """curves.png: the loss, the game if there is one, and two metrics, epoch by epoch."""
    panels = {"loss": list(run.loss_weights)}
    if run.discriminator:
        panels["D(real) and D(fake)"] = ["D(real)", "D(fake)"]
    panels["PSNR in the hole (dB)"] = ["psnr_hole"]
    panels["PSNR of the whole output (dB)"] = ["psnr_output"]
    charts = {}
    for title, names in panels.items():
        curves = {name: [(row["epoch"], row[name]) for row in run.log] for name in names}
        charts[title] = data.chart("epoch", curves)
    return data.beside(charts)


def train(run: Run, folder: Path, training: torch.Tensor, validation: torch.Tensor) -> None:
    """Train a run to its last epoch, from where it stands."""
    rank, world = rank_and_world()
    painter = functools.partial(run_ema, run.ema, mask=run.mask, options=run.options)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_run(folder, run)  # so that even the first epoch can be resumed
        if run.epoch > 0:
            show_run(folder, run, validation)  # what could not be written before
    training = data.to_gpu_if_it_fits(training, run.device)
    if world > 1:
        share_gradients(run)
    while run.epoch < run.options["epochs"]:
        began = time.perf_counter()
        report = train_epoch(run, training)
        seconds = time.perf_counter() - began
        average_buffers(run)
        run.epoch += 1
        if rank == 0:
            past = run.log[-1]["seconds"] if run.log else 0
            row = {"epoch": run.epoch, "step": run.step, "seconds": past + seconds} | report
            run.log.append(row | validate(painter, validation, run.mask))
            run.told = tell(painter, validation, run.mask) if run.epoch == run.options["epochs"] else None
            save_run(folder, run)
            show_run(folder, run, validation)
            say_epoch(run)
        if world > 1:
            dist.barrier()


def say_epoch(run: Run) -> None:
    """A line on the screen for the epoch that has ended."""
    row = run.log[-1]
    logged = {name: row[name] for name in (*run.loss_weights, "D(real)", "D(fake)") if name in row}
    speed = f"{row['seconds']:.0f} s so far  {row['images_per_second']:.0f} images/s"
    psnrs = f"psnr_hole {row['psnr_hole']:.2f}  psnr_output {row['psnr_output']:.2f}"
    data.say(f"epoch {run.epoch}/{run.options['epochs']}  {speed}  {in_words(logged, 1)}  {psnrs}", "stdout")


def new_folder(out: str | None, options: dict) -> Path:
    """Make the folder of a new run: --out, or runs/MODEL-LOSS-ACT-RES with a number that no other run has.

    InputError if --out holds something already, or cannot be made.
    """
    name = f"{options['model']}-{options['loss'].replace('*', 'x')}-{options['act']}-{options['res']}"
    name += "-wild" if options["wild"] else ""
    folder = Path(out or data.free_path(f"runs/{name}"))
    try:
        folder.mkdir(parents=True, exist_ok=out is not None)
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            advice = f"name another folder, or go on with --resume {folder}"
            raise InputError(f"--out {folder} already holds files: {advice}")
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror}): name another folder") from error
    return folder


def train_command(options: dict, folder: Path | None, out: str | None, device: torch.device) -> None:
    """Go on with the run in a folder, or train a new one, in a new folder."""
    rank, world = rank_and_world()
    training, validation = load_data(options, least=2 * world)
    run = begin(folder, options, device, len(training) + len(validation))
    if folder is None:  # only now, so that a run that cannot begin leaves no folder
        with first_process_first():
            folder = new_folder(out, options) if rank == 0 else None
    counts = f"{len(training)} pictures to train on, {len(validation)} to validate"
    where = f"{device_name(device)}, {run.options['precision']}, processes: {world}"
    data.say(f"{folder}: {counts}, on {where}", "stdout")
    try:
        train(run, folder, training, validation)
    except KeyboardInterrupt:
        command = f"python inpaint.py --resume {shlex.quote(str(folder))}"
        raise KeyboardInterrupt(f"go on from the last epoch with: {command}") from None
    if rank == 0:
        psnrs = f"psnr_hole {run.log[-1]['psnr_hole']:.2f}, psnr_output {run.log[-1]['psnr_output']:.2f} dB"
        data.say(f"{folder}/grid.png shows the faces; {psnrs}", "stdout")


# --- Several processes (torchrun) -----------------------------------------------------------------


def join_processes() -> None:
    """Join the processes that torchrun started, if it did. What is printed comes from the first one alone."""
    if dist.is_available() and dist.is_torchelastic_launched():
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # the first reads the pictures alone
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")


def leave_processes() -> None:
    """Leave them again. PyTorch's wrappers hold the group, and are in cycles: they are collected first."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """The first process does something while the others wait; then they do it too, without a word."""
    rank, world = rank_and_world()
    if rank > 0:
        try:
            dist.barrier()
        except RuntimeError:
            sys.exit(2)  # the first process has ended, and has said why
    with contextlib.redirect_stderr(None) if rank > 0 else contextlib.nullcontext():
        yield
    if rank == 0 and world > 1:
        dist.barrier()


def share_gradients(run: Run) -> None:
    """Wrap the networks so that PyTorch averages their gradients over all processes."""
    index = [run.device.index] if run.device.type == "cuda" else None
    wrapped = {name: DistributedDataParallel(network, index) for name, network in run.networks.items()}
    for network in wrapped.values():
        network.broadcast_buffers = False  # batch norm's statistics are averaged after the epoch
    run.generator = wrapped["generator"]
    run.discriminator = wrapped.get("discriminator")


def average_buffers(run: Run) -> None:
    """Make batch norm's statistics, each process's own during an epoch, the mean of all processes."""
    _, world = rank_and_world()
    if world == 1:
        return
    for network in (*run.networks.values(), run.ema):
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world


# --- Evaluating -----------------------------------------------------------------------------------


def evaluate(state: dict, options: dict, device: torch.device) -> None:
    """Print the metrics of a checkpoint as JSON, on the data, hole and split of its run or on others."""
    mask = data.center_hole(options["res"], options["hole"]).to(device)
    _, validation = load_data(options, least=0)
    painter = functools.partial(run_ema, state["ema"], mask=mask, options=options)
    result = validate(painter, validation, mask) | {"told": tell(painter, validation, mask)}
    print(data.to_json(result).decode(), end="", flush=True)  # not say: what is asked for must not get lost


# --- Comparing: table 1 and figure 4 --------------------------------------------------------------

UNET = {"model": "unet", "loss": "l1", "act": "relu"}
PAPER_GAN = {"model": "gan", "loss": "adversarial", "judge": "output", "augment": "none"}
PAPER_GAN |= {"batch": 64, "lr": 2e-4}
PLAIN_GAN = PAPER_GAN | {"loss": "adversarial+30*known", "judge": "restored", "batch": 8}
ROWS = [  # name, what to train, the PSNR that the paper prints
    ("U-Net", UNET, "6.178"),
    ("U-Net", UNET | {"act": "swish"}, "6.093"),
    ("U-Net", UNET | {"loss": "l1+dssim"}, "6.178"),
    ("U-Net", UNET | {"loss": "l1+dssim", "act": "swish"}, "6.065"),
    ("the paper's GAN", PAPER_GAN | {"act": "relu"}, "6.153"),
    ("the paper's GAN", PAPER_GAN | {"act": "swish"}, "6.069"),
    ("GAN, no distance", PLAIN_GAN | {"act": "relu"}, ""),
    ("GAN, no distance", PLAIN_GAN | {"act": "swish"}, ""),
    ("our GAN", {"model": "gan", "act": "relu"}, ""),
    ("the GAN's U-Net alone", {"model": "gan", "loss": "l1", "act": "relu"}, ""),
    ("U-Net, 1 deeper", UNET | {"depth": 6}, ""),
]
DECIDED = {name for _, row, _ in ROWS for name in row}
DIGITS = {"parameters": 0, "minutes": 1} | dict.fromkeys(METRICS, 2)
DIGITS |= dict.fromkeys(("ssim_restored", "speckled", "swd_hole"), 4) | {"told": 3}


def compare(given: dict, out: Path, seeds: int, device: torch.device) -> None:
    """Train the rows that are not finished; write table.md, table.csv, tradeoff.png and comparison.png."""
    rows = [(name, recipe({"res": 64, "epochs": 10} | given | row), paper) for name, row, paper in ROWS]
    first = rows[0][1]  # what all rows have in common
    training, validation = load_data(first, least=2 * rank_and_world()[1])
    mask = data.center_hole(first["res"], first["hole"]).to(device)
    image = data.to_float(validation[:6], device)
    damaged = data.damage(image, mask)
    faces = [("original", image), ("damaged", damaged)]
    table = {}
    for seed in range(first["seed"], first["seed"] + seeds):
        for name, options, paper in rows:
            words = (name, options["loss"], options["act"])
            folder = out / re.sub(r"[^\w.+]+", "-", f"{' '.join(words)} seed {seed}")
            run = begin(folder, options | {"seed": seed}, device, len(training) + len(validation))
            if run.epoch < run.options["epochs"]:
                train(run, folder, training, validation)
            if rank_and_world()[0] > 0:
                continue  # the first process alone has a log
            restored = data.paste(run_ema(run.ema, damaged, mask, run.options), image, mask)
            row = table.setdefault(words, {"words": words, "paper": paper, "faces": restored, "runs": []})
            parameters = sum(weight.numel() for weight in run.networks["generator"].parameters())
            more = {"parameters": parameters, "minutes": run.log[-1]["seconds"] / 60, "told": run.told}
            row["runs"].append(run.log[-1] | more)
            data.say(table_line(table_cells(row)), "stdout")
            write_table(out, list(table.values()), faces)
    if rank_and_world()[0] == 0:
        below = baselines(training, validation, mask)
        write_table(out, [*table.values(), *below], faces)
        data.say(f"{out}/table.md, {out}/tradeoff.png and {out}/comparison.png are written", "stdout")


def baselines(training: torch.Tensor, validation: torch.Tensor, mask: torch.Tensor) -> list[dict]:
    """Rows of the table for the methods without training."""
    image = data.to_float(validation[:6], mask.device)
    training = data.to_gpu_if_it_fits(training, mask.device)  # the nearest face is looked for many times
    rows = []
    for name, painter in models.without_training(training, mask).items():
        data.progress(f"measuring: {name}")
        began = time.time()
        result = validate(painter, validation, mask) | {"told": tell(painter, validation, mask)}
        result |= {"parameters": 0, "minutes": (time.time() - began) / 60}
        faces = data.paste(painter(data.damage(image, mask)), image, mask)
        rows.append({"words": (name, "", ""), "paper": "", "faces": faces, "runs": [result]})
    return rows


def table_cells(row: dict) -> dict[str, str]:
    """A row of the table as text: mean, and ± standard deviation if there are several runs."""
    cells = dict(zip(("network", "loss", "activation"), row["words"]))
    for name, digits in DIGITS.items():
        values = [run[name] for run in row["runs"] if run[name] is not None]
        cells[name] = f"{statistics.mean(values):,.{digits}f}" if values else ""
        if len(values) > 1 and name in (*METRICS, "told"):
            cells[name] += f" ± {statistics.stdev(values):.{digits}f}"
    return cells | {"paper": row["paper"]}


def table_line(cells: dict[str, str]) -> str:
    """The cells of a row of the table in Markdown."""
    return f"| {' | '.join(cells.values())} |"


def write_table(out: Path, table: list[dict], faces: list) -> None:
    """table.md, table.csv, tradeoff.png and comparison.png, from the rows that are there."""
    cells = [table_cells(row) for row in table]
    head = [table_line({name: name for name in cells[0]}), table_line(dict.fromkeys(cells[0], "---"))]
    data.save(out / "table.md", "\n".join([*head, *map(table_line, cells), ""]).encode())
    data.save(out / "table.csv", data.to_csv(cells))
    across_and_up = ("psnr_hole", "swd_hole")
    points = {}
    for row in table:
        name = ", ".join(filter(None, row["words"]))
        faces = [*faces, (name, row["faces"])]
        if row["words"][1]:  # those without training lie so far off that the others would be one point
            psnr, swd = (statistics.mean(run[metric] for run in row["runs"]) for metric in across_and_up)
            points[name] = [(psnr, swd)]
    title = "across: psnr_hole (dB), more is closer to the original; up: swd_hole, less looks more real"
    data.save(out / "tradeoff.png", data.png(data.chart(title, points, 800, 400)))
    data.save(out / "comparison.png", data.png(data.grid(faces)))


# --- Restoring your own photo ---------------------------------------------------------------------

# EXIF of a TIFF that is kept: title, camera, resolution, program, date, author, rights; details, place.
KEPT = {270, 271, 272, 282, 283, 296, 305, 306, 315, 33432, 34665, 34853}
# A hole narrower than this share of the photo's shorter side is filled smoothly: a network does it worse.
THIN = 0.04


def restore_photos(given: dict, state: dict, options: dict) -> None:
    """All photos of --restore and in its folders. One that fails does not stop the others, and is named."""
    out = Path(given.get("out", "restored"))
    if out.suffix.lower() in data.PICTURES:
        raise InputError(f"--out {out} is named like a picture: it takes a folder, for all that is written")
    out.mkdir(parents=True, exist_ok=True)
    files, failed, done = [], [], 0
    for path in map(Path, given["restore"]):
        try:
            files += photos_in(path) if path.is_dir() else [path]
        except InputError as error:
            failed.append(str(error))
    for file in files:
        try:
            restore_photo(state["ema"], options, file, given.get("mask"), out)
            done += 1
        except (InputError, OSError) as error:
            failed.append(str(error))
    if failed:
        raise InputError(f"{done} of {len(files)} photos are restored; {'; '.join(failed)}")


def photos_in(folder: Path) -> list[Path]:
    """The pictures in a folder, but for those that this program wrote."""
    files = [file for _, file in data.find_pictures(folder)]
    photos = [file for file in files if not file.name.endswith(("-restored.png", "-compare.png"))]
    if not photos:
        raise InputError(f"{folder} holds only pictures that this program wrote: name other photos")
    return photos


def restore_photo(ema: models.UNet, options: dict, file: Path, mask_file: str | None, out: Path) -> None:
    """NAME-restored.png and NAME-compare.png in `out`, both numbered if one of them exists.

    Known pixels are the photo's, to the bit; what its file tells of it (`read_exif`) is kept.
    """
    photo = read_photo(file)
    pixels = data.to_tensor(photo)
    mask = read_mask(mask_file, photo) if mask_file else central_mask(photo, options)
    image = data.to_float(pixels)
    restored = fill(ema, options, image, mask).mul(255).round().to(torch.uint8)
    picture = data.to_picture(torch.where(mask > 0, restored, pixels))
    profile = photo.info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":  # the same colours on the same screen
        picture.info["icc_profile"] = profile
    sheets = {"damaged": data.to_picture(data.damage(image, mask)), "restored": picture}
    if not mask_file:
        sheets["original"] = photo
    contents = {"-restored.png": data.png(picture, read_exif(file))}
    contents["-compare.png"] = data.png(data.beside(sheets, 384))
    path = data.free_path(out / file.stem, tuple(contents))
    for ending, content in contents.items():
        data.save(path + ending, content)
    data.say(" ".join(path + ending for ending in contents), "stdout")


def read_photo(file: Path, behind: str = "white") -> PIL.Image.Image:
    """open_photo of a file; InputError with its name if it cannot be read or is no picture."""
    try:
        return data.open_photo(file.read_bytes(), behind=behind)
    except OSError as error:
        raise data.cannot_read(file, error) from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def read_exif(file: Path) -> bytes:
    """The EXIF of a picture file (date, camera, place), its orientation set to upright; empty if it has none.

    EXIF that cannot be read does not cost the photo: it is left out with a line.
    """
    try:
        # Pillow only warns of damaged EXIF, and gives what is left of it.
        with warnings.catch_warnings(action="error", category=UserWarning), PIL.Image.open(file) as picture:
            exif = picture.getexif()
            # In a TIFF, the same list also says where in the file the pixels are.
            for tag in set(exif) - KEPT if picture.format == "TIFF" else ():
                del exif[tag]
            if not exif:
                return b""
            exif[PIL.ExifTags.Base.Orientation] = 1
            return exif.tobytes()
    except Exception as error:  # as for the pixels: a broken file can raise anything
        data.say(f"warning: {file}: its EXIF (date, camera, place) is left out: it cannot be read ({error})")
        return b""


def central_mask(photo: PIL.Image.Image, options: dict) -> torch.Tensor:
    """The hole of the training, in the central square of the photo: (1, H, W), 1 in the hole."""
    square = min(photo.size)
    first, end = data.center_span(options["res"], options["hole"])
    side = max(1, round(square * (end - first) / options["res"]))
    start = round(square * first / options["res"])
    top, left = ((length - square) // 2 + start for length in (photo.height, photo.width))
    mask = torch.zeros(1, photo.height, photo.width)
    mask[:, top : top + side, left : left + side] = 1
    return mask


def read_mask(file: str, photo: PIL.Image.Image) -> torch.Tensor:
    """What is missing from a photo, (1, H, W), 1 in the hole: what is brighter than half of the brightest.

    Transparent parts count as black. A mask may be larger than the photo: each pixel that its white touches
    is missing. InputError for other proportions than the photo's, but for the rounding of one pixel of the
    smaller picture, and for a mask that is all black or all white.
    """
    picture = read_photo(Path(file), behind="black").convert("L")
    rounding = max(picture.size + photo.size)
    if abs(picture.width * photo.height - picture.height * photo.width) > rounding:
        sizes = f"{picture.width} x {picture.height}, the photo {photo.width} x {photo.height}"
        raise InputError(f"--mask {file} is {sizes}: it takes the same proportions")
    if picture.width < photo.width:
        picture = picture.resize(photo.size, PIL.Image.Resampling.NEAREST)
    values = np.asarray(picture)
    mask = torch.from_numpy(values > values.max() / 2)[None].float()
    mask = F.adaptive_max_pool2d(mask, (photo.height, photo.width))  # the largest of all that touch a pixel
    meaning = "white is what is to be filled, black the rest"
    if not mask.any() or mask.all():
        raise InputError(f"--mask {file} is all {'white' if mask.any() else 'black'}: {meaning}")
    share = float(mask.mean())
    reminder = f" ({meaning})" if share > 0.5 else ""
    data.say(f"--mask {file}: {share:.1%} of the photo is to be filled{reminder}")
    return mask


def thick_part(mask: torch.Tensor, cell: int, reach: int) -> torch.Tensor:
    """What of a mask (1, H, W) is more than dust and scratches: a square of 2 * reach + 1 cells fits in.

    What lies within half of `reach` of such a square belongs to it: a round hole keeps its border.
    """
    known = F.max_pool2d(1 - mask, cell, ceil_mode=True)  # 1 where any pixel of the cell is known
    middles = 1 - F.max_pool2d(known, 2 * reach + 1, 1, reach)
    far = reach + reach // 2
    near = F.max_pool2d(middles, 2 * far + 1, 1, far)
    return mask * F.interpolate(near[None], mask.shape[1:])[0]


def holes(mask: torch.Tensor, cell: int, gap: int) -> list[tuple[int, int, int, int]]:
    """The bounding box of each hole of a mask (1, H, W). Two that are `gap` cells apart or less are one."""
    cells = F.max_pool2d(mask, cell, ceil_mode=True)  # 1 where any pixel of the cell is missing
    found = []
    while cells.any():
        top, left = cells[0].nonzero()[0].tolist()
        box, before = (top, left, top + 1, left + 1), None
        while box != before:
            before = box
            box = bounding_box(cells, around(box, gap + 1))
        cells[around(box, 0)] = 0
        found.append(bounding_box(mask, around([end * cell for end in box], 0)))
    return found


def around(box: tuple[int, int, int, int], rim: int) -> tuple[slice, slice, slice]:
    """The part of a picture (C, H, W) in a box, with `rim` pixels around it where there are some."""
    top, left, bottom, right = box
    return slice(None), slice(max(0, top - rim), bottom + rim), slice(max(0, left - rim), right + rim)


def bounding_box(mask: torch.Tensor, part: tuple[slice, slice, slice]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of what is missing in a part of a mask, the last two just outside."""
    rows = mask[part][0].any(1).nonzero() + part[1].start
    columns = mask[part][0].any(0).nonzero() + part[2].start
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def view(options: dict, box: tuple[int, int, int, int]) -> tuple[float, float, float]:
    """The square of a photo that the network sees: (left, top, photo's pixels for one of its own).

    The hole's bounding box, made a square, lies where the hole was in training: in the middle. The view may
    leave the photo.
    """
    top, left, bottom, right = box
    first, end = data.center_span(options["res"], options["hole"])
    scale = max(bottom - top, right - left) / (end - first)
    middle = (first + end) / 2 * scale  # of the hole, from the left or top end of the view
    return (left + right) / 2 - middle, (top + bottom) / 2 - middle, scale


def fill(ema: models.UNet, options: dict, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Fill all holes of a photo of any size: photo (3, H, W) in [0, 1], mask (1, H, W) -> restored (3, H, W).

    What is thin is filled smoothly, then the network paints the other holes, each by itself. `paint` makes
    what comes into a hole, `join` fits it to the rim, `data.paste` puts it there and nowhere else.
    """
    reach = round(THIN / 2 * min(photo.shape[1:]))
    cell = max(1, reach // 4)  # a large photo's holes are looked for on a map of cells of several pixels
    thick = thick_part(mask, cell, reach // cell)
    thin = mask - thick
    restored = photo.clone()
    for box in holes(thin, cell, 0):
        here = around(box, 1)
        smooth = models.harmonic(restored[here][None], mask[here][None])[0]
        restored[here] = data.paste(smooth, restored[here], thin[here])
    known = 1 - thick
    seen = restored * known
    for box in holes(thick, cell, reach // cell):
        here = around(box, 1)
        joined = join(paint(ema, options, seen, known, box), seen[here], thick[here])
        restored[here] = data.paste(joined, seen[here], thick[here])
    if torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]):  # a grey photo stays grey
        restored = restored.mean(0, keepdim=True).expand_as(photo)
    return restored


def paint(ema: models.UNet, options: dict, seen: torch.Tensor, known: torch.Tensor, box: tuple):
    """What the network paints for the hole in a box: (3, h, w), with one pixel `around` the box.

    seen (3, H, W) is the photo, 0 where known (1, H, W) is 0. The network looks through a square of it
    (`view`), in which all other holes are filled smoothly.
    """
    res = options["res"]
    x0, y0, scale = view(options, box)
    square = (x0, y0, x0 + res * scale, y0 + res * scale)
    # How much of each small pixel is known: only that gives its colour.
    share = data.crop_resize(known, square, (res, res))
    image = data.crop_resize(seen, square, (res, res)) / share.clamp(min=1e-6)
    unknown = (share < 0.5).float()[None]
    image = models.harmonic(image.clamp(0, 1)[None], unknown)  # beyond the photo's edge too
    # A network knows the holes of its training: the one in the centre or, for photos, rectangles.
    hole = data.center_hole(res, options["hole"])
    if options["wild"]:
        ends = [(end - start) / scale for end, start in zip(box, (y0, x0, y0, x0))]
        hole = data.box_mask(torch.tensor([ends]).round(), res)
    device = next(ema.parameters()).device
    output = run_ema(ema, data.damage(image, hole).to(device), hole.to(device), options).cpu()[0]
    if "adversarial" in options["loss"]:  # beside the hole, a GAN's output is no exact copy
        output = data.paste(output, image, hole)[0]
    # Back in the photo.
    _, rows, columns = here = around(box, 1)
    height, width = seen[here].shape[1:]
    left, top = columns.start, rows.start
    ends = (left - x0, top - y0, left + width - x0, top + height - y0)
    return data.crop_resize(output, [end / scale for end in ends], (width, height))


def join(output: torch.Tensor, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What was painted, with no step at the rim of the hole: (3, H, W) twice, mask (1, H, W) -> (3, H, W).

    At the rim, the photo differs a little from what the network painted for the same known pixels. That
    difference is carried on into the hole by Laplace's equation and added.
    """
    difference = (photo - output) * (1 - mask)
    return (output + models.harmonic(difference[None], mask[None])[0]).clamp(0, 1)


# --- The command ----------------------------------------------------------------------------------

def parser() -> argparse.ArgumentParser:
    """The command line. It says only what was given; the other values are those of the recipe or the run."""
    cards = []
    for model, card in RECIPES.items():
        values = " ".join(f"--{name} {value}" for name, value in card.items())
        cards.append(f"  --model {model}: {values}")
    p = argparse.ArgumentParser(
        "inpaint.py",
        description=__doc__,
        epilog="\n".join(["the recipes, which stand for options that are not given:", *cards]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    p.error = refuse  # argparse would print the usage first
    jobs = p.add_argument_group("jobs (without one of these: train)")
    add = jobs.add_mutually_exclusive_group().add_argument
    add("--resume", metavar="RUN", help="go on with the run in this folder; --epochs may grow")
    add("--evaluate", metavar="CHECKPOINT", help="measure a generator.pt on validation pictures; prints JSON")
    add("--restore", nargs="+", metavar="PHOTO", help="fill the hole of photos, or of all in a folder")
    add("--compare", action="store_true", help="train all rows of the paper's table 1, and more")
    add = p.add_argument_group("with these jobs").add_argument
    add("--checkpoint", help="with --restore: the generator.pt of a run")
    add("--mask", help="with --restore: a picture of the photo's shape, white where it is missing")
    add("--seeds", type=int, metavar="K", help="with --compare: train each row K times (1)")
    add = p.add_argument_group("what to train").add_argument
    add("--model", choices=RECIPES, help="the paper's network (unet), by its recipe below")
    add("--act", choices=models.ACTIVATIONS, help="activation function (relu)")
    add("--loss", metavar="TERMS", help=f"a sum of {', '.join(losses.TERMS)}, as in 30*l1+adversarial")
    add("--hole-weight", type=float, metavar="X", help="l1 and mse count the hole X times (10; paper: 1)")
    add("--judge", choices=["middle", "restored", "output"], help="what the discriminator sees: the middle "
        "half of the restored picture, all of it, or the whole output (middle; paper: output)")  # fmt: skip
    add("--augment", choices=["color+shift", "none"], help="how it is changed (color+shift; paper: none)")
    add("--depth", type=int, metavar="N", help="levels of the U-Net: one more sees further")
    add("--width", type=int, metavar="N", help="channels of the first level, the discriminator's too")
    add("--limit", type=int, metavar="N", help="channels double from level to level, up to N x width")
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="PATH", help="a folder or .zip of pictures (drawn faces)")
    add("--res", type=int, choices=[32, 64, 128, 256, 512], help="side of the pictures in pixels")
    add("--hole", type=float, metavar="F", help="side of the hole, as a share of --res (0.3)")
    add("--wild", action="store_true", help="for photos that are not cut like the training pictures")
    add("--val", type=float, metavar="F", help="share of the pictures that validates (0.2)")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=int, metavar="N", help="times through the pictures (12; 10 to compare)")
    add("--batch", type=int, metavar="N", help="pictures a step, for each process (8)")
    add("--lr", type=float, metavar="X", help="highest learning rate of the generator")
    add("--seed", type=int, metavar="N", help="of all random choices (0)")
    add("--precision", choices=["auto", "bfloat16", "float32"], help="of the networks (auto: the faster)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="where it runs (auto: a GPU, if any)")
    add("--out", metavar="DIR", help="folder for what is written (runs/..., runs/compare or restored)")
    return p


def refuse(message: str):
    """What the parser does with a mistake."""
    raise InputError(f"{message}; --help lists all options")


def recipe(given: dict) -> dict:
    """All options of a new run: those given, else those of its --model. InputError if they do not fit."""
    model = given.get("model", "unet")
    options = {"model": model} | DEFAULTS | RECIPES[model] | given
    check_options(options)
    loss, judge, hole = options["loss"], options["judge"], options["hole"]
    if "adversarial" not in losses.parse_loss(loss):
        for name in ("judge", "augment"):
            if name in given:
                raise InputError(f"--{name} does nothing with --loss {loss}, which has no adversarial term")
        return options
    if model == "unet":
        raise InputError(f"--loss {loss} needs a discriminator, which --model unet has not: add --model gan")
    if judge == "middle" and hole > 0.4:
        raise InputError(f"--hole {hole} nearly fills the middle half: take --judge restored, or 0.4 at most")
    return options


def check_jobs(given: dict) -> None:
    """InputError for an option that the job does not use, and for --restore without its network."""
    for name, value in given.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise InputError(f"{flag(name)} is empty: give a value, or leave it out")
    if "out" in given and ("resume" in given or "evaluate" in given):
        raise InputError("--out does nothing with --resume and --evaluate: leave it out")
    for name, job in (("mask", "restore"), ("checkpoint", "restore"), ("seeds", "compare")):
        if name in given and job not in given:
            raise InputError(f"--{name} does nothing without --{job}: leave it out, or add --{job}")
    for name in given:
        if "compare" in given and name in DECIDED:
            raise InputError(f"{flag(name)} does nothing with --compare, whose rows decide it: leave it out")
    if "restore" in given and "checkpoint" not in given:
        raise InputError("--restore needs --checkpoint: the generator.pt of a run folder")
    if given.get("seeds", 1) < 1:
        raise InputError(f"--seeds {given['seeds']} will not do: it takes 1 or more")


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps -> a device that is there; of several processes each takes its own GPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise InputError(f"--device {name}: this machine or this PyTorch has none; leave the option out")
    if name != "cuda":
        return torch.device(name)
    _, world = rank_and_world()
    number = int(os.environ["LOCAL_RANK"]) if world > 1 else 0
    if number >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"{world} processes for {gpus} GPUs: start one process for each GPU")
    # float32 means float32: else PyTorch rounds the factors of a convolution to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def choose_precision(wanted: str, device: torch.device) -> str:
    """auto, bfloat16 or float32 -> one of the last two: bfloat16 where the device is faster with it.

    Those are GPUs from Ampere on, CPUs with AMX, and AMD's with AVX512-BF16: on Intel's without AMX a step in
    bfloat16 takes 1.4 times as long. PyTorch before 2.11 cannot say: float32.
    """
    if wanted == "bfloat16" and not torch.amp.is_autocast_available(device.type):
        raise InputError(f"--precision bfloat16: this PyTorch has none for {device.type}; it takes float32")
    if wanted != "auto":
        return wanted
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        cpu = torch.cpu.get_capabilities()
        fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", ""))
    return "bfloat16" if fast else "float32"


def use_checkpoint(given: dict, changed: dict, device: torch.device) -> None:
    """Evaluate a network or restore photos with it, in one process: more would do the same."""
    rank, _ = rank_and_world()
    leave_processes()
    if rank > 0:
        return
    path = given.get("evaluate") or given["checkpoint"]
    state = read_checkpoint(path, device)
    if "restore" in given:
        state["options"]["precision"] = "auto"  # what this device is fast at
    free = ("res", "hole", "data", "val", "precision") if "evaluate" in given else ("precision",)
    options = state["options"] | changed
    refuse_changes(options, state["options"], free, path)
    check_options(options)
    options["precision"] = choose_precision(options["precision"], device)
    if "evaluate" in given:
        evaluate(state, options, device)
    else:
        restore_photos(given, state, options)


def main(argv: list[str] | None = None) -> None:
    """The program: check what was asked for, then do it."""
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have letters that the screen has not
        sys.stdout.reconfigure(errors="backslashreplace")
    join_processes()
    with mistakes_in_one_line():
        given = vars(parser().parse_args(argv))
        check_jobs(given)
        device = choose_device(given.get("device", "auto"))
        options = {name: value for name, value in given.items() if name in TRAINING}  # of those given
        if "loss" in options:
            options["loss"] = options["loss"].replace(" ", "")
        if options.get("data", "synthetic") != "synthetic":
            options["data"] = os.path.abspath(options["data"])  # so that the run can go on from anywhere
        if "compare" in given:
            compare(options, Path(given.get("out", "runs/compare")), given.get("seeds", 1), device)
        elif "resume" in given:
            stored = read_checkpoint(Path(given["resume"]) / "last.pt")["options"]
            train_command(stored | options, Path(given["resume"]), None, device)
        elif "evaluate" in given or "restore" in given:
            use_checkpoint(given, options, device)
        else:
            train_command(recipe(options), None, given.get("out"), device)


@contextlib.contextmanager
def mistakes_in_one_line():
    """A mistake of the user inside this ends the program with one line and exit code 2, Ctrl-C with 130."""
    try:
        yield
    except InputError as error:
        stop(error, 2, rank_and_world()[0] == 0)  # each process sees the mistake, the first one tells it
    except OSError as error:
        stop(f"{error}: see whether there is room, and who may write; what was saved before is intact", 2)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        stop("out of memory: try a smaller --batch, --width or --res, or a smaller photo", 2)
    except KeyboardInterrupt as error:
        how = error if error.args else "start again with the same command"
        stop(f"stopped; {how}", 130, rank_and_world()[0] == 0)
    finally:
        leave_processes()


def stop(message: object, code: int, told: bool = True) -> None:
    """The exit code, and one line on stderr."""
    if told:
        data.say("inpaint.py: " + " ".join(str(message).split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
