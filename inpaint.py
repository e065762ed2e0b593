"""File 4 of 4, inpaint.py: train, measure, compare, restore (paper, sections 2.5, 3 and 4).

    python inpaint.py --model gan --act relu --res 64                    a GAN, on drawn faces: no download
    python inpaint.py --model unet --data img_align_celeba.zip           a U-Net, on CelebA
    python inpaint.py --resume runs/NAME                                 go on with a run that was stopped
    python inpaint.py --evaluate runs/NAME/best.pt > figures.json        measure it again
    python inpaint.py --restore me.jpg --checkpoint runs/NAME/best.pt    your own photo
    python inpaint.py --compare --data img_align_celeba.zip              the paper's table 1 and figure 4
    torchrun --nproc-per-node 4 inpaint.py --model unet ...              several GPUs

What you learn here: the training step of a U-Net and of a GAN, in 50 lines; then everything around it, in the
order in which it happens: an epoch, a run and its folder, the comparison, your own photo, the command line.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import errno
import functools
import gc
import inspect
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

# The paper's two networks, and what both have in common: the default of every option of a training.
PRESETS = {
    "unet": {"res": 128, "loss": "l1", "depth": 5, "width": 32, "limit": 2, "lr": 3e-3},
    "gan": {"res": 64, "loss": "adversarial+30*known", "depth": 4, "width": 24, "limit": 16, "lr": 2e-4},
}
COMMON = {
    "act": "relu", "hole_weight": 10.0, "fake": "restored", "batch": 8, "epochs": 12, "seed": 0,
    "data": "synthetic", "hole": 0.3, "hole_at": "center", "val": 0.2, "precision": "auto",
}  # fmt: skip
DISTANCE_RATE = 5e-4  # of a GAN with a distance in its loss: the distance guides it, so it may learn faster
DISCRIMINATOR_RATE = 2e-4  # DCGAN's; a discriminator that learns faster wins before the generator can paint
WEIGHT_DECAY = 0.05  # of the U-Net: a little against overfitting
SMOOTH = 0.1  # the target for real pictures is 0.9, so that the discriminator is never certain

# --- What is trained, and the step ----------------------------------------------------------------


class Run:
    """What a run is made of: its options, networks, averaged generator, optimisers, counters and log.

    The seed and `--model` decide the first weights: `--model` says how they are drawn, PyTorch's way or
    DCGAN's. The loss decides whether there is a discriminator. `ema` is the averaged generator.
    """

    def __init__(self, options: dict, device: torch.device):
        self.options, self.device, self.step, self.epoch = options, device, 0, 0
        self.log = []  # a row for each epoch
        self.fingerprint = None  # of the pictures, to know them again
        self.loss_weights = losses.parse_loss(options["loss"])
        torch.manual_seed(options["seed"])
        self.generator, self.discriminator = self.start(build_generator(options)), None
        self.generator.start_by_keeping()
        if "adversarial" in self.loss_weights:
            self.discriminator = self.start(models.Discriminator(options["res"], options["width"]))
        self.ema = copy.deepcopy(self.generator).eval().requires_grad_(False)
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.networks = {name: network for name, network in networks.items() if network}
        adam = {"betas": (0.5, 0.999), "weight_decay": WEIGHT_DECAY if options["model"] == "unet" else 0.0}
        self.optimizers = {
            name: torch.optim.AdamW(network.parameters(), **adam, fused=device.type != "mps")
            for name, network in self.networks.items()
        }

    def start(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network with the weights that `--model` asks for, on the device."""
        if self.options["model"] == "gan":
            models.dcgan_init(network)
        return network.to(self.device, memory_format=torch.channels_last)


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step down the gradient of the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def update_ema(ema: torch.nn.Module, network: torch.nn.Module, step: int) -> None:
    """ema <- d * ema + (1 - d) * network, batch norm's statistics too; d = min(0.999, (n + 1) / (n + 10)).

    A mean over about the last ninth of all steps, 1,000 at most. It does what a lower learning rate would do.
    """
    pairs = zip(ema.state_dict().values(), network.state_dict().values())
    averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(averages, current, 1 - min(0.999, (step + 1) / (step + 10)))  # all in one call


def training_step(run: Run, image: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Damage, paint, judge, update: image (B, 3, H, W) with its holes, mask (B, 1, H, W) -> what is logged.

    Nothing here waits for the device: the numbers are tensors until somebody reads them.
    """
    damaged, terms, report, options = data.damage(image, mask), {}, {}, run.options
    precision = functools.partial(autocast, run.device, options["precision"])
    with precision():
        output = run.generator(damaged, mask)  # (B, 3, H, W), the whole picture
    if run.discriminator:
        real = image
        fake = data.paste(output, image, mask) if options["fake"] == "restored" else output
        # (1) The discriminator: a high D(real), a low D(fake). The generator is left out: detach.
        with precision():
            real_logit, fake_logit = run.discriminator(real), run.discriminator(fake.detach())  # (B,) each
        report["d_loss"] = losses.discriminator_loss(real_logit, fake_logit, SMOOTH)
        update(run.optimizers["discriminator"], report["d_loss"])
        report |= {"D(real)": real_logit.sigmoid().mean(), "D(fake)": fake_logit.sigmoid().mean()}
        # (2) The generator: a high D(fake), judged anew. The discriminator's weights are left out.
        discriminator = unwrap(run.discriminator).requires_grad_(False)
        with precision():
            terms["adversarial"] = losses.generator_loss(discriminator(fake))
        discriminator.requires_grad_(True)
    # With any network: minimise the distance from the original too, if the loss has one.
    terms |= losses.distances(run.loss_weights, output, image, mask, options["hole_weight"])
    update(run.optimizers["generator"], sum(run.loss_weights[name] * term for name, term in terms.items()))
    update_ema(run.ema, unwrap(run.generator), run.step)
    run.step += 1
    return {name: value.detach() for name, value in (terms | report).items()}


# --- Several processes (torchrun) -----------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_gradients(run: Run) -> None:
    """Wrap the networks so that PyTorch averages their gradients over all processes."""
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if new else "broadcast_buffers"  # its name before PyTorch 2.13
    ids = [run.device.index] if run.device.type == "cuda" else None
    run.generator = DistributedDataParallel(run.generator, ids, **{keyword: False})
    if run.discriminator:
        run.discriminator = DistributedDataParallel(run.discriminator, ids, **{keyword: False})


def unwrap(network: torch.nn.Module) -> torch.nn.Module:
    """The network itself, without PyTorch's wrapper for several processes."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def average_buffers(run: Run) -> None:
    """Make batch norm's statistics, each process's own during an epoch, the mean of all processes."""
    _, world = rank_and_world()
    for network in (*run.networks.values(), run.ema) if world > 1 else ():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world


def in_first_process(work):
    """work() in process 0 alone -> its result in all of them. If it is an InputError, all of them end."""
    rank, world = rank_and_world()
    result = [None]
    if rank == 0:
        try:
            result = [work()]
        except InputError as error:
            result = [error]
    if world > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], InputError):
        raise result[0]
    return result[0]


# --- An epoch -------------------------------------------------------------------------------------


def draw_epoch(options: dict, epoch: int, count: int, take: int) -> tuple[torch.Tensor, ...]:
    """The random choices of one epoch: order, mirrored or not, holes. Seed, epoch and process decide them.

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


def learning_rate(highest: float, step: int, total: int) -> float:
    """Rises in a straight line to `highest` over the first tenth of all steps, then falls in one to 0.

    Fresh weights get small steps first. At the end, small steps let the run converge (section 2.5).
    """
    return highest * min(1, (step + 1) / max(1, 0.1 * total), (total - step) / (0.9 * total))


def train_epoch(run: Run, training: torch.Tensor) -> dict[str, float]:
    """All batches of one epoch -> its speed, and the means of what training_step reports."""
    options, sums, began, (rank, world) = run.options, {}, time.perf_counter(), rank_and_world()
    here = len(training) // world  # pictures for this process
    batch = min(options["batch"], here)
    steps = here // batch
    total = options["epochs"] * steps
    order, flip, boxes = draw_epoch(options, run.epoch, len(training), steps * batch)
    boxes, shown = boxes.to(run.device), began
    highest = {"generator": options["lr"], "discriminator": DISCRIMINATOR_RATE}
    for i, image in enumerate(data.batches(training, batch, order, flip, run.device)):
        for name, optimizer in run.optimizers.items():
            rate = learning_rate(highest[name], run.epoch * steps + i, total)
            optimizer.param_groups[0]["lr"] = rate
        report = training_step(run, image, data.box_mask(boxes[i * batch : (i + 1) * batch], options["res"]))
        sums = {name: sums.get(name, 0) + value for name, value in report.items()}
        if rank == 0 and time.perf_counter() - shown > 1:
            check_finite(run, sums)
            shown = time.perf_counter()
            rate, done = (i + 1) * batch * world / (shown - began), run.epoch * steps + i + 1
            means = "  ".join(f"{name} {float(value) / (i + 1):.4f}" for name, value in sums.items())
            data.progress(
                f"epoch {run.epoch + 1}/{options['epochs']}  step {i + 1}/{steps}"
                f"  {rate:.0f} images/s  {means}{data.time_left((total - done) * batch * world, rate)}"
            )
    check_finite(run, sums)
    for network in (*run.networks.values(), run.ema):
        check_finite(run, {f"a weight ({name})": value.sum() for name, value in network.state_dict().items()})
    speed = {"images_per_second": steps * batch * world / (time.perf_counter() - began)}
    return speed | {name: float(value) / steps for name, value in sums.items()}


def check_finite(run: Run, sums: dict[str, torch.Tensor]) -> None:
    """InputError naming the first number that is not finite any more."""
    for name, value in sums.items():
        if not math.isfinite(value):
            raise InputError(f"{name} is {float(value)} in epoch {run.epoch + 1}, before step {run.step}:"
                             f" the last epoch is kept; in a new run, try --lr {run.options['lr'] / 4:g}"
                             " or --precision float32")  # fmt: skip


def autocast(device: torch.device, precision: str):
    """A context in which networks run in bfloat16, if that is the precision. Losses stay outside."""
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def run_ema(ema: models.UNet, damaged: torch.Tensor, mask: torch.Tensor, options: dict) -> torch.Tensor:
    """What the averaged generator, in evaluation mode, paints for damaged pictures (B, 3, H, W)."""
    with autocast(damaged.device, options["precision"]):
        return ema(damaged.contiguous(memory_format=torch.channels_last), mask)


REALISM = ("swd_hole", "sharpness")
FIGURES = (*losses.METRICS, *REALISM)


def part_size(pixels: torch.Tensor) -> int:
    """How many pictures are measured at once: 100 at 64 px, and as much memory at any resolution."""
    return max(1, 100 * 64**2 // pixels.shape[2] ** 2)


def validate(painter, pixels: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """All FIGURES over a validation set, uint8 (N, 3, res, res): means over pictures, and two of realism.

    `painter(damaged)` -> output (B, 3, res, res): a network, or a method without one. Both measures of
    realism look at the first 8 parts only: 800 pictures at 64 px.
    """
    values, kept = [], []
    for part in pixels.split(part_size(pixels)):
        image = part.to(mask.device).float() / 255
        output = painter(data.damage(image, mask))
        restored = data.paste(output, image, mask)
        values.append(losses.measure(output, restored, image, mask))
        if len(kept) < 8:
            kept.append((restored, image))
    result = dict(zip(losses.METRICS, torch.cat(values, 1).cpu().double().mean(1).tolist()))
    restored, image = (torch.cat(parts) for parts in zip(*kept))
    realism = losses.swd(restored, image, mask), losses.sharpness(restored, image, mask)
    return result | dict(zip(REALISM, realism)) | {"pictures": len(pixels)}


# --- A run and its folder -------------------------------------------------------------------------

KIND, VERSION = "face inpainting checkpoint", 2
OLDER = {"limit": 16, "fake": "output"}  # options that came later, with the value that was built in before


def load_pixels(options: dict) -> torch.Tensor:
    """The data set of --data as uint8 (N, 3, res, res); the first process reads it, the others find its
    cache."""
    if options["data"] == "synthetic":
        return data.synthetic_faces(data.SYNTHETIC, options["res"])
    pixels = []
    in_first_process(lambda: pixels.append(data.load_images(options["data"], options["res"])))
    if pixels:
        return pixels[0]
    with contextlib.redirect_stderr(None):  # the first process has told what there is to tell
        return data.load_images(options["data"], options["res"])


def load_data(options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(training part, validation part) of --data; InputError if there is too little of either."""
    training, validation = data.split(load_pixels(options), options["val"])
    count, need = len(training) + len(validation), 2 * rank_and_world()[1]
    if len(training) < need or not len(validation):
        raise InputError(f"--val {options['val']} of the {count} pictures in --data {options['data']} leaves"
                         f" {len(training)} to train on and {len(validation)} to validate:"
                         f" it takes at least {need} and 1")  # fmt: skip
    return training, validation


WRITTEN = (  # by a run, into its folder
    "last.pt", "best.pt", "config.json", "results.json", "log.csv", "curves.png", "grid.png", "training.gif",
    "frames",
)  # fmt: skip


def new_folder(out: str | None, options: dict) -> Path:
    """Make the folder of a new run: --out, or runs/MODEL-LOSS-ACT-RES with a number that no other run has.

    InputError if --out holds a file that a run would write over.
    """
    if out:
        taken = [name for name in WRITTEN if (Path(out) / name).exists()]
        if taken:
            what = f"a run: go on with --resume {out}, or" if "last.pt" in taken else f"{taken[0]}:"
            raise InputError(f"--out {out} already holds {what} name another folder")
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out} cannot be made ({error.strerror}): name another folder") from error
        return Path(out)
    name = f"runs/{options['model']}-{options['loss'].replace('*', 'x')}-{options['act']}-{options['res']}"
    for number in itertools.count(1):
        folder = Path(name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def save_checkpoint(path: Path, run: Run, everything: bool) -> None:
    """best.pt: weights and options. last.pt: also all that a resume needs. Tensors and plain types only.

    There is no random state to keep: that of an epoch is made from the seed and the epoch's number
    (draw_epoch).
    """
    state = {"kind": KIND, "version": VERSION, "options": run.options, "epoch": run.epoch}
    state["ema"] = run.ema.state_dict()
    if everything:
        state |= {"step": run.step, "log": run.log, "fingerprint": run.fingerprint}
        state["processes"] = rank_and_world()[1]
        state |= {name: network.state_dict() for name, network in run.networks.items()}
        state |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in run.optimizers.items()}}
    stream = io.BytesIO()
    torch.save(state, stream)
    data.save(path, stream.getbuffer())


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """The dictionary of a checkpoint with valid options; InputError for any other file. It runs no code."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        advice = "see who may read it" if isinstance(error, PermissionError) else "give the best.pt of a run"
        advice = f"give {Path(path) / 'best.pt'}" if isinstance(error, IsADirectoryError) else advice
        raise InputError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about unknown files, and then it fails
            state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as error:  # what torch says about such a file fills a screen and helps nobody
        raise InputError(f"{path} is no checkpoint, or damaged: give another one, or train again") from error
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise InputError(f"{path} is a file of another program: give the best.pt or last.pt of a run folder")
    if state.get("version") not in (1, VERSION):
        raise InputError(
            f"{path} has version {state.get('version')}; this program reads 1 and {VERSION}: train again"
        )
    return state | {"options": sound_options(path, state.get("options"))}


def sound_options(path: str | Path, stored: dict) -> dict:
    """The options of a checkpoint, those that it lacks added, if the command line would have taken them."""
    try:
        options = {"model": stored["model"]} | COMMON | PRESETS[stored["model"]] | OLDER
        options = {name: stored.get(name, value) for name, value in options.items()}
        words = [f"{flag(name)}={value}" for name, value in options.items()]
        if vars(parser().parse_args(words)) != options | {"device": "auto"}:
            raise ValueError("one is of another type")
        check_options(options)
    except (InputError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"the options in {path} are damaged ({error}): give another file") from error
    return options


def build_generator(options: dict) -> models.UNet:
    """The U-Net of these options, with fresh weights."""
    return models.UNet(options["depth"], options["width"], options["act"], options["limit"])


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> tuple[models.UNet, dict]:
    """(the averaged generator, ready to paint; the options of its run) from a best.pt or last.pt."""
    state = read_checkpoint(path, device)
    ema = build_generator(state["options"]).eval()
    try:
        if state["ema"]["keep.weight"].shape[2] == 3:
            ema.keep = torch.nn.Conv2d(4, 3, 3, padding=1)  # as it was at first
        ema.requires_grad_(False).load_state_dict(state["ema"])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: its weights do not fit its options") from error
    precision = choose_precision(state["options"]["precision"], torch.device(device))
    return ema.to(device, memory_format=torch.channels_last), state["options"] | {"precision": precision}


def open_run(folder: Path, options: dict, device: torch.device, fingerprint: torch.Tensor) -> Run:
    """The run in a folder as its last.pt has it, with these options; InputError for other pictures."""
    if choose_precision(options["precision"], device) != options["precision"]:
        raise InputError(f"the run in {folder} has --precision {options['precision']}; this PyTorch has"
                         f" none for {device.type}: go on where it began")  # fmt: skip
    run, (_, world) = Run(options, device), rank_and_world()
    state = read_checkpoint(folder / "last.pt", device)
    try:
        run.ema.load_state_dict(state["ema"])
        for name, network in run.networks.items():
            network.load_state_dict(state[name])
            run.optimizers[name].load_state_dict(state["optimizers"][name])
            run.optimizers[name].param_groups[0]["fused"] = device.type != "mps"  # perhaps another device's
        run.step, run.epoch, run.log = state["step"], state["epoch"], state["log"]
        run.fingerprint = state.get("fingerprint", fingerprint).cpu()  # an older run has none to compare
        processes = state["processes"]
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'last.pt'} is damaged, or of an older version: start a new run"
        ) from error
    if len(run.fingerprint) != len(fingerprint):
        raise InputError(f"--data {options['data']} holds {len(fingerprint)} pictures, the run in {folder}"
                         f" had {len(run.fingerprint)}: give the same pictures")  # fmt: skip
    changed = (run.fingerprint - fingerprint).abs().amax(1) > 1  # less is another processor's rounding
    if changed.any():
        first = int(changed.nonzero()[0]) + 1
        raise InputError(f"picture {first} of {len(fingerprint)} in --data {options['data']} is not the one"
                         f" that the run in {folder} had: give the same pictures")  # fmt: skip
    if run.epoch < options["epochs"] and processes != world:
        raise InputError(
            f"the run in {folder} had {processes} processes, now there are {world}: start it as before"
        )
    return run


def describe(run: Run) -> dict:
    """config.json: every option, versions, device, parameter counts."""
    on_gpu, versions = run.device.type == "cuda", {"torch": torch, "numpy": np, "pillow": PIL}
    return {
        "options": run.options,
        "versions": {"python": platform.python_version()} | {k: v.__version__ for k, v in versions.items()},
        "device": torch.cuda.get_device_name() if on_gpu else f"{run.device.type} {platform.machine()}",
        "processes": rank_and_world()[1],
        "parameters": {name: sum(p.numel() for p in net.parameters()) for name, net in run.networks.items()},
    }


def to_json(value: dict) -> bytes:
    """A dictionary as the bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def to_csv(rows: list[dict]) -> bytes:
    """Rows with the same keys as the bytes of a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_log(folder: Path, run: Run) -> None:
    """log.csv and curves.png, whole, from the rows that last.pt keeps."""
    data.save(folder / "log.csv", to_csv(run.log))
    panels = {"loss": list(run.loss_weights)}
    if run.discriminator:
        panels["D(real) and D(fake)"] = ["D(real)", "D(fake)"]
    panels |= {"PSNR in the hole (dB)": ["psnr_hole"], "PSNR of the whole output (dB)": ["psnr_output"]}
    charts = []
    for title, names in panels.items():
        curves = {name: [(row["epoch"], row[name]) for row in run.log] for name in names}
        charts.append(data.chart(title, "epoch", curves))
    data.save(folder / "curves.png", data.png(data.beside(charts)))


def write_pictures(folder: Path, run: Run, pixels: torch.Tensor, mask: torch.Tensor, best: bool) -> None:
    """grid.png, if these are the best weights: eight fixed validation faces, damaged, output, restored,
    original.

    frames/EPOCH.png: three of them, restored, for training.gif.
    """
    image = pixels[:8].to(run.device).float() / 255
    damaged = data.damage(image, mask)
    output = run_ema(run.ema, damaged, mask, run.options)
    restored = data.paste(output, image, mask)
    if best:
        strips = [("damaged", damaged), ("output", output), ("restored", restored), ("original", image)]
        data.save(folder / "grid.png", data.png(data.grid(strips)))
    (folder / "frames").mkdir(exist_ok=True)
    name = f"{run.epoch:04d}"  # as many digits in each, or the faces would jump in the film
    data.save(folder / "frames" / f"{name}.png", data.png(data.grid([(f"epoch {name}", restored[:3])])))


def best_row(run: Run) -> dict:
    """The epoch whose weights best.pt holds: the best in the hole; with a discriminator the last one, because
    PSNR does not reward the detail that it adds."""
    return run.log[-1] if run.discriminator else max(run.log, key=lambda row: row["psnr_hole"])


def finish_epoch(run: Run, folder: Path, row: dict, validation: torch.Tensor, mask: torch.Tensor) -> None:
    """Validate and write, in the first process. last.pt comes last: a resume writes all before it again."""
    row |= validate(functools.partial(run_ema, run.ema, mask=mask, options=run.options), validation, mask)
    run.log.append(row)
    best = best_row(run) is row
    if best:
        save_checkpoint(folder / "best.pt", run, everything=False)
        result = {name: row[name] for name in (*FIGURES, "pictures", "epoch")}
        data.save(folder / "results.json", to_json(result))
    write_pictures(folder, run, validation, mask, best)
    write_log(folder, run)
    if run.epoch == run.options["epochs"]:
        files = [folder / "frames" / f"{epoch:04d}.png" for epoch in range(run.epoch + 1)]
        frames = [PIL.Image.open(file).convert("RGB") for file in files if file.exists()]
        data.save(folder / "training.gif", data.gif(frames))
    save_checkpoint(folder / "last.pt", run, everything=True)
    data.progress(None)
    means = "  ".join(
        f"{name} {row[name]:.4f}" for name in [*run.loss_weights, "D(real)", "D(fake)"] if name in row
    )
    speed = f"{row['seconds']:.0f} s so far  {row['images_per_second']:.0f} images/s"
    psnrs = f"psnr_hole {row['psnr_hole']:.2f}  psnr_output {row['psnr_output']:.2f}"
    say(f"epoch {run.epoch}/{run.options['epochs']}  {speed}  {means}  {psnrs}")


def train(run: Run, folder: Path, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Train a run to its last epoch, from where it stands. A finished run is left as it is."""
    (training, validation), options, (rank, world) = parts, run.options, rank_and_world()
    mask = data.center_hole(options["res"], options["hole"]).to(run.device)
    if run.epoch < options["epochs"] and rank == 0:
        # Before the first step, so that even the first epoch can be resumed.
        save_checkpoint(folder / "last.pt", run, everything=True)
        data.save(folder / "config.json", to_json(describe(run)))
        if run.epoch == 0:
            write_pictures(folder, run, validation, mask, best=True)
    training = data.settle(training, run.device)
    if world > 1:
        share_gradients(run)
    while run.epoch < options["epochs"]:
        began = time.perf_counter()
        report = train_epoch(run, training)
        seconds = time.perf_counter() - began
        average_buffers(run)
        run.epoch += 1
        if rank == 0:
            past = run.log[-1]["seconds"] if run.log else 0
            row = {"epoch": run.epoch, "step": run.step, "seconds": past + seconds}
            finish_epoch(run, folder, row | report, validation, mask)
        if world > 1:
            dist.barrier()


def train_command(options: dict, given: dict, device: torch.device) -> None:
    """Train a new run, or go on with the one in the folder of --resume."""
    parts, (rank, world) = load_data(options), rank_and_world()
    fingerprint = torch.cat([data.fingerprint(part) for part in parts])
    if "resume" in given:
        folder = Path(given["resume"])
        run = open_run(folder, options, device, fingerprint)
    else:
        run = Run(options, device)
        run.fingerprint = fingerprint
        folder = in_first_process(lambda: new_folder(given.get("out"), options))
    done = ", all epochs are done" if run.epoch == options["epochs"] else ""
    several = f", {world} processes" if world > 1 else ""
    say(f"{folder}: {len(parts[0])} pictures to train on, {len(parts[1])} to validate,"
        f" on {describe(run)['device']}, {options['precision']}{several}{done}")  # fmt: skip
    try:
        train(run, folder, parts)
    except KeyboardInterrupt:
        resume = f"python inpaint.py --resume {shlex.quote(folder.as_posix())}"
        stop(f"stopped; go on from the last epoch with: {resume}", 130)
    if rank == 0:
        best = best_row(run)
        psnrs = f"psnr_hole {best['psnr_hole']:.2f}, psnr_output {best['psnr_output']:.2f} dB"
        say(f"{folder}/grid.png shows the faces; {psnrs}")


def say(line: str) -> None:
    """A line on the screen, from the first process only."""
    if rank_and_world()[0] == 0:
        print(line, flush=True)


# --- Evaluating -----------------------------------------------------------------------------------


def evaluate(given: dict, device: torch.device) -> None:
    """Print the figures of a checkpoint as JSON; resolution, hole, data and split are those of its run."""
    ema, options = load_generator(given["evaluate"], device)
    options |= given
    check_options(options)
    options["precision"] = choose_precision(options["precision"], device)
    mask = data.center_hole(options["res"], options["hole"]).to(device)
    _, validation = data.split(load_pixels(options), options["val"])
    if not len(validation):
        raise InputError(
            f"--val {options['val']} of --data {options['data']} leaves no picture to measure: give more"
        )
    result = validate(functools.partial(run_ema, ema, mask=mask, options=options), validation, mask)
    print(to_json(result).decode(), end="", flush=True)


# --- Comparing: table 1 and figure 4 --------------------------------------------------------------

PAPER_GAN = {"model": "gan", "loss": "adversarial", "fake": "output", "batch": 64}
ROWS = [  # name, what to train, the PSNR that the paper prints
    ("U-Net", {"model": "unet", "loss": "l1", "act": "relu"}, 6.178),
    ("U-Net", {"model": "unet", "loss": "l1", "act": "swish"}, 6.093),
    ("U-Net", {"model": "unet", "loss": "l1+dssim", "act": "relu"}, 6.178),
    ("U-Net", {"model": "unet", "loss": "l1+dssim", "act": "swish"}, 6.065),
    ("GAN, judged by output", PAPER_GAN | {"act": "relu"}, 6.153),
    ("GAN, judged by output", PAPER_GAN | {"act": "swish"}, 6.069),
    ("GAN", {"model": "gan", "act": "relu"}, None),
    ("GAN", {"model": "gan", "act": "swish"}, None),
    ("GAN + L1", {"model": "gan", "loss": "120*l1+adversarial", "act": "relu"}, None),
    ("the GAN's U-Net alone", {"model": "gan", "loss": "l1", "act": "relu"}, None),
    ("U-Net, 1 deeper", {"model": "unet", "loss": "l1", "act": "relu", "depth": 6}, None),
]
COLUMNS = ["network", "loss", "activation", "parameters", "minutes", *FIGURES, "paper"]


def compare(given: dict, device: torch.device) -> None:
    """Train the rows that are not finished; write table.md, table.csv, tradeoff.png and comparison.png."""
    out, first, seeds = Path(given.get("out", "runs/compare")), given.get("seed", 0), given.get("seeds", 1)
    table = []
    for name, row, paper in ROWS:
        row = {"res": 64, "epochs": 10} | row | given
        if 2 ** row.get("depth", 1) <= row["res"]:
            options = complete_options(row, device)
            shown = {"network": name, "loss": options["loss"], "act": options["act"], "paper": paper}
            table.append(shown | {"options": options, "runs": []})
    options = table[0]["options"]
    parts = load_data(options)
    fingerprint = torch.cat([data.fingerprint(part) for part in parts])
    mask = data.center_hole(options["res"], options["hole"]).to(device)
    image = parts[1][:6].to(device).float() / 255
    damaged, below = data.damage(image, mask), baselines(parts, mask, image)
    say("| " + " | ".join(COLUMNS) + " |")
    for seed in range(first, first + seeds):
        for row in table:
            options = row["options"] | {"seed": seed}
            folder = out / row_folder(options)
            figures, trained = finish_row(folder, options, given, parts, fingerprint, device)
            row["runs"].append(figures)
            ema, stored = load_generator(folder / "best.pt", device)
            if "faces" not in row:  # the first seed's
                row["faces"] = data.paste(run_ema(ema, damaged, mask, stored), image, mask)
            say(table_line(row))
            last = row is table[-1] and seed == first + seeds - 1
            if rank_and_world()[0] == 0 and (trained or last):  # until then, an older table keeps its rows
                write_table(out, [row for row in table if row["runs"]] + below, image, damaged)
    for row in below:
        say(table_line(row))
    say(f"{out}/table.md, {out}/tradeoff.png and {out}/comparison.png are written")


def row_folder(options: dict) -> str:
    """A name for a row's run: all that tells the rows of the table apart."""
    fake = f"-{options['fake']}" if "adversarial" in options["loss"] else ""
    name = f"{options['model']}-{options['loss'].replace('*', 'x')}{fake}-{options['act']}"
    return f"{name}-depth{options['depth']}-seed{options['seed']}"


def finish_row(folder: Path, options: dict, given: dict, parts: tuple, fingerprint, device) -> tuple:
    """Train a row to its end -> (its figures, whether it was unfinished). A finished one is only read."""
    if in_first_process((folder / "last.pt").exists):
        stored = read_checkpoint(folder / "last.pt")["options"]
        options |= {"data": stored["data"]}  # the place may differ, and the machine
        if given.get("precision", "auto") == "auto":
            options |= {"precision": stored["precision"]}
        refuse_changes(options, stored, f"the run in {folder}")
        run = open_run(folder, options, device, fingerprint)
    else:
        run = Run(options, device)
        run.fingerprint = fingerprint
        in_first_process(lambda: folder.mkdir(parents=True, exist_ok=True))
    trained = run.epoch < options["epochs"]
    train(run, folder, parts)
    more = {"parameters": sum(weight.numel() for weight in run.networks["generator"].parameters())}
    figures = in_first_process(lambda: best_row(run) | more | {"minutes": run.log[-1]["seconds"] / 60})
    return figures, trained


def baselines(parts: tuple, mask: torch.Tensor, image: torch.Tensor) -> list[dict]:
    """Rows of the table for the methods without training, and the floor of swd_hole: two halves of the
    originals."""
    (training, validation), table, empty = parts, [], {"loss": "", "act": "", "paper": None}
    for name, painter in models.without_training(training, mask).items():
        began = time.time()
        result = validate(painter, validation, mask)
        result |= {"parameters": 0, "minutes": (time.time() - began) / 60}
        faces = data.paste(painter(data.damage(image, mask)), image, mask)
        table.append(empty | {"network": name, "runs": [result], "faces": faces})
    count = min(8 * part_size(validation), len(validation) // 2)  # as many as validate looks at
    if count:
        one, other = validation[:count].float() / 255, validation[-count:].float() / 255
        floor = dict.fromkeys(COLUMNS[3:-1], math.nan) | {"swd_hole": losses.swd(one, other, mask.cpu())}
        table.append(empty | {"network": "originals, two halves", "runs": [floor]})
    return table


def table_row(row: dict) -> dict:
    """A row of the table as text: mean, and ± standard deviation if there are several runs."""
    cells = {"network": row["network"], "loss": row["loss"], "activation": row["act"]}
    for name in COLUMNS[3:-1]:
        values = [run[name] for run in row["runs"]]
        digits = {"parameters": 0, "minutes": 1, "ssim_restored": 4, "swd_hole": 4}.get(name, 2)
        cells[name] = "" if math.isnan(values[0]) else f"{statistics.mean(values):,.{digits}f}"
        if len(values) > 1 and digits and name != "minutes":
            cells[name] += f" ± {statistics.stdev(values):.{digits}f}"
    return cells | {"paper": f"{row['paper']:.3f}" if row["paper"] else ""}


def table_line(row: dict) -> str:
    """A row of the table in Markdown."""
    return "| " + " | ".join(table_row(row).values()) + " |"


def write_table(out: Path, table: list[dict], image: torch.Tensor, damaged: torch.Tensor) -> None:
    """table.md, table.csv, tradeoff.png and comparison.png, from the rows that are there."""
    head = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS))]
    data.save(out / "table.md", ("\n".join([*head, *map(table_line, table)]) + "\n").encode())
    data.save(out / "table.csv", to_csv([table_row(row) for row in table]))
    points, strips = {}, [("original", image), ("damaged", damaged)]
    for row in table:
        words = [row["network"], row["loss"], row["act"]]
        figures = [statistics.mean(run[name] for run in row["runs"]) for name in ("psnr_hole", "swd_hole")]
        if row["loss"]:  # those without training lie so far off that the others would fall into one point
            points[", ".join(filter(None, words))] = [tuple(figures)]
        if "faces" in row:
            words[:2] = words[0].replace(" ", "\n"), words[1].replace("+", " +\n")
            strips.append(("\n".join(filter(None, words)), row["faces"]))
    title, across = (
        "swd_hole: lower looks more real",
        "psnr_hole (dB): further right is closer to the original",
    )
    data.save(out / "tradeoff.png", data.png(data.chart(title, across, points, 800, 400)))
    data.save(out / "comparison.png", data.png(data.grid(strips, upright=True)))


# --- Restoring your own photo ---------------------------------------------------------------------


def photo_mask(file: str | None, photo: PIL.Image.Image, options: dict) -> torch.Tensor:
    """What is missing from a photo, (1, H, W), 1 in the hole: the mask file, or the training's hole.

    A mask's transparent parts count as black. What is brighter than half of its brightest value is missing.
    """
    width, height = photo.size
    if not file:
        square = min(width, height)
        corner, side = hole_of(options)
        start, side = round(square * corner / options["res"]), max(1, round(square * side / options["res"]))
        top, left = ((length - square) // 2 + start for length in (height, width))
        mask = torch.zeros(1, height, width)
        mask[:, top : top + side, left : left + side] = 1
        return mask
    try:
        picture = data.read_photo(Path(file), behind="black").convert("L")
    except InputError as error:
        raise InputError(f"--mask {file}: {error}") from error
    rounding = max(width, height, *picture.size)  # a pixel more or less
    if abs(picture.width * height - width * picture.height) > rounding:
        raise InputError(f"--mask {file} is {picture.width} x {picture.height}, the photo {width} x {height}:"
                         " it takes the same proportions")  # fmt: skip
    values = np.asarray(picture.resize(photo.size, PIL.Image.Resampling.NEAREST))
    brightest = int(values.max())
    mask = torch.from_numpy(values > brightest / 2)[None]
    grey = float(((values > 0.2 * brightest) & (values < 0.8 * brightest)).mean())
    problem = "all black, so nothing is missing" if not brightest else "all white, so everything is missing"
    if grey > 0.2:  # a soft brush and a JPEG make some
        problem = f"{grey:.0%} grey, like a photo"
    if grey > 0.2 or not brightest or mask.all():
        raise InputError(f"--mask {file} is {problem}: white is what is to be filled, black the rest")
    if brightest < 255 or grey:
        data.say(f"--mask {file}: missing is what is brighter than {brightest // 2} of 255,"
                 f" {mask.float().mean():.1%} of the photo")  # fmt: skip
    return mask.float()


def hole_of(options: dict) -> tuple[int, int]:
    """(first row and column, side) of the hole that a network was trained with, in its pixels."""
    top, _, bottom, _ = data.center_box(options["res"], options["hole"])[0].tolist()
    return top, bottom - top


def view(options: dict, size: tuple, rows: tuple, columns: tuple) -> tuple[float, float, float]:
    """The square of a photo (H, W) that the network sees: (left, top, photo's pixels for one of its own).

    rows and columns are (first, end) of the hole. A network that learnt the centre hole relies on its place
    more than on its mask: the hole's bounding square lies exactly there. One that learnt random holes sees
    all it can, so a photo that is framed like the training pictures is seen as they were. But the hole stays
    between a quarter and one and a half of the usual size. Its middle stays in the middle half of the square,
    but at the photo's ends.
    """
    res, (first, side) = options["res"], hole_of(options)
    scale = max(rows[1] - rows[0], columns[1] - columns[0]) / side
    middles = [sum(rows) / 2, sum(columns) / 2]
    if options["hole_at"] == "center":
        y0, x0 = (middle - (first + side / 2) * scale for middle in middles)
        return x0, y0, scale
    scale = np.clip(min(size) / res, scale / 1.5, scale * 4)

    def start(middle, length):
        """The top or left end, along an axis of the photo."""
        seen, rest = res * scale, length - res * scale
        best = np.clip(rest / 2, middle - 0.75 * seen, middle - 0.25 * seen)
        return np.clip(best, min(0, rest), max(0, rest))  # not beyond the photo, if it is large enough

    y0, x0 = map(start, middles, size)
    return x0, y0, scale


def fill(ema: models.UNet, options: dict, photo: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Paint the hole of a photo of any size: photo (3, H, W) in [0, 1], mask (1, H, W) -> restored (3, H, W).

    The network looks through a square of the photo (`view`), and what it paints is scaled back. At the rim,
    the photo differs a little from what the network painted for the same known pixels. That difference is
    carried on into the hole by Laplace's equation and added, so no step is left.
    """
    res, known = options["res"], 1 - mask
    seen = photo * known
    rows, columns = mask[0].any(1).nonzero(), mask[0].any(0).nonzero()
    top, bottom, left, right = (int(end) for end in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
    x0, y0, scale = view(options, photo.shape[1:], (top, bottom), (left, right))
    square = (x0, y0, x0 + res * scale, y0 + res * scale)
    # How much of each small pixel is known: only that gives its colour.
    share = crop_resize(known, square, (res, res))
    image = (crop_resize(seen, square, (res, res)) / share.clamp(min=1e-6)).clamp(0, 1)[None]
    unknown = (share < 0.5).float()[None]
    image = models.harmonic(image, unknown)  # beyond the photo's edge too: the hole's mask ends before it
    random = options["hole_at"] == "random"  # such a network has learnt to use its mask
    hole = unknown if random else data.center_hole(res, options["hole"])
    damaged, device = data.damage(image, hole), next(ema.parameters()).device
    output = run_ema(ema, damaged.to(device), hole.to(device), options).cpu()[0]
    # Back in the photo: the hole's bounding box, with one known pixel around it where there is one.
    top, left = max(0, top - 1), max(0, left - 1)
    bottom, right = min(photo.shape[1], bottom + 1), min(photo.shape[2], right + 1)
    box = [(left - x0) / scale, (top - y0) / scale, (right - x0) / scale, (bottom - y0) / scale]
    painted = crop_resize(output, box, (right - left, bottom - top))
    here = (slice(None), slice(top, bottom), slice(left, right))
    difference = (photo[here] - painted) * known[here]
    joined = (painted + models.harmonic(difference[None], mask[here][None])[0]).clamp(0, 1)
    if torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2]):  # a grey photo stays grey
        joined = joined.mean(0, keepdim=True).expand_as(joined)
    restored = photo.clone()
    restored[here] = data.paste(joined, photo[here], mask[here])
    return restored


def crop_resize(z: torch.Tensor, box: tuple, size: tuple[int, int]) -> torch.Tensor:
    """Scale the part of z (C, H, W) in a box of real-valued corners to size (w, h) -> (C, h, w).

    The box may leave the picture: beyond its border, the border is repeated.
    """
    shrink = int((box[2] - box[0]) / size[0] / 8)
    if shrink > 1:  # more than 8 pixels for one: take means first, or a large photo's box fills the memory
        z, box = torch.nn.functional.avg_pool2d(z, shrink, ceil_mode=True), [end / shrink for end in box]
    (_, height, width), (x, y) = z.shape, (math.floor(box[0]), math.floor(box[1]))
    right, bottom = math.ceil(box[2]), math.ceil(box[3])
    inside = z[:, max(y, 0) : bottom, max(x, 0) : right]
    beyond = (max(-x, 0), max(right - width, 0), max(-y, 0), max(bottom - height, 0))
    seen = torch.nn.functional.pad(inside, beyond, mode="replicate").numpy()
    inner = (box[0] - x, box[1] - y, min(box[2] - x, right - x), min(box[3] - y, bottom - y))
    lanczos = PIL.Image.Resampling.LANCZOS  # as the training pictures were scaled
    planes = [np.asarray(PIL.Image.fromarray(plane).resize(size, lanczos, inner, 3.0)) for plane in seen]
    return torch.from_numpy(np.stack(planes))


def restore_photo(ema: models.UNet, options: dict, file: Path, mask_file: str | None, out: Path) -> None:
    """NAME-restored.png and NAME-compare.png in `out`, numbered if they exist; known pixels are the
    photo's, to the bit."""
    photo = data.read_photo(file)
    pixels, mask = data.to_tensor(photo), photo_mask(mask_file, photo, options)
    image = pixels.float() / 255
    restored = fill(ema, options, image, mask).mul(255).round().to(torch.uint8)
    picture = data.to_picture(torch.where(mask > 0, restored, pixels))
    profile = photo.info.get("icc_profile") or b""
    # The same colours on the same screen.
    picture.info["icc_profile"] = profile if profile[16:20] == b"RGB " else None
    parts = {"damaged": data.to_picture(data.damage(image, mask)), "restored": picture}
    parts |= {} if mask_file else {"original": photo}
    name = free_name(out, file.stem)
    restored_file, compare_file = out / f"{name}-restored.png", out / f"{name}-compare.png"
    try:
        data.save(restored_file, data.png(picture))
    except BaseException:
        restored_file.unlink(missing_ok=True)  # the empty one
        raise
    data.save(compare_file, data.png(data.side_by_side(parts)))
    print(restored_file, compare_file, flush=True)


def free_name(out: Path, stem: str) -> str:
    """stem, or stem-2, stem-3, ...: the first that no picture in `out` has.

    It makes an empty -restored.png, so that another process takes another name.
    """
    out.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        with contextlib.suppress(FileExistsError):
            if not (out / f"{name}-compare.png").exists():
                (out / f"{name}-restored.png").touch(exist_ok=False)
                return name


def restore_photos(given: dict, device: torch.device) -> None:
    """All photos of --restore; those that fail are named at the end, and the others are restored all the
    same.

    In folders, pictures that this program wrote are passed over.
    """
    if "checkpoint" not in given:
        raise InputError("--restore needs --checkpoint: the best.pt of a run folder")
    ema, options = load_generator(given["checkpoint"], device)
    options["precision"] = choose_precision("auto", device)  # what this device is fast at
    files, failed, done, out = [], [], 0, Path(given.get("out", "restored"))
    for path in map(Path, given["restore"]):
        try:
            if os.path.isdir(path):  # unlike Path.is_dir, no error where it cannot look
                found = [path / name for name, *_ in data.list_pictures(path)[0]]
                files += [file for file in found if not written_here(file)]
            else:
                files.append(path)
        except InputError as error:
            failed.append(str(error))
    if not files and not failed:
        raise InputError(
            f"{' '.join(given['restore'])} holds only what this program wrote: name other photos"
        )
    for file in files:
        try:
            restore_photo(ema, options, file, given.get("mask"), out)
            done += 1
        except BrokenPipeError:
            raise
        except (InputError, OSError, RuntimeError, MemoryError) as error:
            advice = ": try a smaller photo" if reason(error) == MEMORY else ""
            failed.append(f"{file}: {reason(error) or error}{advice}")
    if failed:
        raise InputError(f"{done} of {len(files)} photos are restored; " + "; ".join(failed))


def written_here(file: Path) -> bool:
    """Whether this program wrote a picture; one that cannot be read is told later, as any other."""
    with contextlib.suppress(InputError, OSError):
        return data.is_ours(data.read_file(file))
    return False


# --- The command ----------------------------------------------------------------------------------

TRAINING = {"model", *COMMON, *PRESETS["unet"]}  # the options that decide what is trained
USES = {  # what each job makes use of
    "train": TRAINING | {"out"},
    "resume": TRAINING,
    "compare": TRAINING - {"model", "act", "loss", "depth", "fake", "hole_weight"} | {"out", "seeds"},
    "evaluate": {"res", "hole", "data", "val", "precision"},
    "restore": {"checkpoint", "mask", "out"},
}


def number(kind: type, low: float, high: float):
    """An argparse type: a whole or real number between two bounds, both included."""

    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(
                f"{text!r} will not do: it takes a {what} from {low:,} to {high:,}"
            )
        return value

    return read


def loss_terms(text: str) -> str:
    """An argparse type: the text, without its spaces, once it has proved to be a loss."""
    text = text.replace(" ", "")
    try:
        losses.parse_loss(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parser() -> argparse.ArgumentParser:
    """The command line. What is not given is left out; complete_options then adds the defaults of the
    tables above."""
    p = argparse.ArgumentParser(
        "inpaint.py", description=(__doc__ or "").partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    p.error = refuse  # argparse would print the usage first
    both = {
        name: " or ".join(f"{PRESETS[model][name]} ({model})" for model in PRESETS)
        for name in PRESETS["unet"]
    }
    # fmt: off
    jobs = p.add_argument_group("jobs (without one of these: train)")
    add = jobs.add_mutually_exclusive_group().add_argument
    add("--resume", metavar="RUN",
        help="go on with the run in this folder, with its own options; --epochs may grow (3 epochs and then "
        "3 more end lower than 6 at once: the learning rate has been at 0 between them), and --data may"
        " say where the same pictures are now")
    add("--evaluate", metavar="CHECKPOINT",
        help="measure a best.pt or last.pt on validation pictures; prints JSON")
    add("--restore", nargs="+", metavar="PHOTO", help="fill the hole of photos, or of all in a folder")
    add("--compare", action="store_true", help="train all rows of the paper's table 1, and more")
    add = p.add_argument_group("with these jobs").add_argument
    add("--checkpoint", help="with --restore: the best.pt of a run")
    add("--mask",
        help="with --restore: a picture of the photo's shape, white where it is missing; default: the hole "
        "of the training")
    add("--seeds", type=number(int, 1, 100), metavar="K",
        help="with --compare: train each row K times; default 1")
    add = p.add_argument_group("what to train").add_argument
    add("--model", choices=PRESETS,
        help="the paper's network: decides how weights start, the weight decay, and the defaults of --res, "
        "--loss, --depth, --width, --limit and --lr; default unet")
    add("--act", choices=models.ACTIVATIONS, help=f"activation function; default {COMMON['act']}")
    add("--loss", type=loss_terms, metavar="TERMS",
        help=f"a sum of {', '.join(losses.TERMS)}, as in 120*l1+adversarial; with adversarial there is a "
        f"discriminator; default {both['loss']}")
    add("--hole-weight", type=number(float, 1e-3, 1e6), metavar="X",
        help=f"l1 and mse count pixels in the hole X times (the paper: 1); default {COMMON['hole_weight']:g}")
    add("--fake", choices=["restored", "output"],
        help="what the discriminator is shown as fake: the output pasted into the known picture, or the "
        f"whole output (the paper); default {COMMON['fake']}")
    add("--depth", type=number(int, 1, 9), metavar="N",
        help=f"levels of the U-Net: one more sees further; default {both['depth']}")
    add("--width", type=number(int, 1, 1024), metavar="N",
        help="channels of the first level, the discriminator's too; raise it for 200,000 pictures and a GPU; "
        f"default {both['width']}")
    add("--limit", type=number(int, 1, 256), metavar="N",
        help=f"channels double from level to level, up to N x width; default {both['limit']}")
    add = p.add_argument_group("data").add_argument
    add("--data", metavar="PATH",
        help="a folder of pictures or a .zip, such as CelebA's; default synthetic: 5,000 drawn faces")
    add("--res", type=int, choices=[32, 64, 128, 256, 512], help=f"side in pixels; default {both['res']}")
    add("--hole", type=number(float, 1e-6, 1 - 1e-6), metavar="F",
        help=f"side of the hole as a share of the picture's; default {COMMON['hole']}")
    add("--hole-at", choices=["center", "random"],
        help="random: for photos with holes elsewhere; half of the holes are still in the centre; default "
        f"{COMMON['hole_at']}")
    add("--val", type=number(float, 1e-6, 1), metavar="F",
        help=f"share of the pictures, the last by name, that validates; default {COMMON['val']}")
    add = p.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1, 10**6), metavar="N",
        help=f"times through the training pictures; default {COMMON['epochs']}, 10 with --compare")
    add("--batch", type=number(int, 1, 10**6), metavar="N",
        help="pictures a step, for each process; on a GPU raise it, and --lr with it; default "
        f"{COMMON['batch']}")
    add("--lr", type=number(float, 1e-12, 10), metavar="X",
        help=f"highest learning rate of Adam (the discriminator's is {DISCRIMINATOR_RATE}); default "
        f"{both['lr']}, {DISTANCE_RATE} for a gan with a distance in its loss")
    add("--seed", type=number(int, 0, 2**31), metavar="N",
        help="of all random choices: weights, order, mirroring, holes; with --compare the first of --seeds; "
        f"default {COMMON['seed']}")
    add("--precision", choices=["auto", "bfloat16", "float32"],
        help="of the networks; default auto: bfloat16 where the device is fast at it")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="default auto: a GPU if there is one")
    add("--out", metavar="DIR",
        help="folder for what is written; default runs/MODEL-LOSS-ACT-RES, runs/compare or restored")
    # fmt: on
    return p


def refuse(message: str):
    """What the parser does with a mistake."""
    raise InputError(f"{message}; --help lists all options")


def flag(name: str) -> str:
    """hole_at -> --hole-at."""
    return "--" + name.replace("_", "-")


def choose_job(given: dict) -> str:
    """Which job is asked for; InputError for an option that it does not use, or an empty one."""
    job = next((name for name in USES if name in given), "train")
    for name, value in given.items():
        if "" in (value if isinstance(value, list) else [value]):
            raise InputError(f"{flag(name)} '': give the path, or leave it out")
        if name not in USES[job] | {job}:
            place = "in a training" if job == "train" else f"with --{job}"
            add = "".join(f", or add --{other}" for other in USES if job == "train" and name in USES[other])
            raise InputError(f"{flag(name)} does nothing {place}: leave it out{add}")
    return job


def complete_options(given: dict, device: torch.device) -> dict:
    """Every option that decides what is trained: those given, then those of --model, then the common ones."""
    model = given.get("model", "unet")
    options = (
        {"model": model} | COMMON | PRESETS[model] | {name: given[name] for name in TRAINING if name in given}
    )
    weights = losses.parse_loss(options["loss"])
    if "lr" not in given and model == "gan" and set(weights) & set(losses.DISTANCES):
        options["lr"] = DISTANCE_RATE
    if "hole_weight" in given and not {"l1", "mse"} & set(weights):
        raise InputError(
            f"--hole-weight does nothing with --loss {options['loss']}: only l1 and mse use it, leave it out"
        )
    if "fake" in given and "adversarial" not in weights:
        raise InputError(
            f"--fake does nothing with --loss {options['loss']}: there is no discriminator, leave it out"
        )
    if options["val"] == 1:
        raise InputError("--val 1 leaves no picture to train on: it is for --evaluate only")
    check_options(options)
    return options | {"precision": choose_precision(options["precision"], device)}


def check_options(options: dict) -> None:
    """Check the options against each other; InputError if they do not fit together."""
    res, side = options["res"], round(options["res"] * options["hole"])
    if not 1 <= side < res:
        raise InputError(
            f"--hole {options['hole']} of --res {res} is {side} pixels wide: it must hide some and leave some"
        )
    if 2 ** options["depth"] > res:
        raise InputError(
            f"--depth {options['depth']} halves --res {res} below a pixel: at most {int(math.log2(res))} fit"
        )


def resumed_options(given: dict) -> dict:
    """The options of the run in --resume; --epochs may grow, and --data may say where the pictures are
    now."""
    folder = Path(given["resume"])
    state = read_checkpoint(folder / "last.pt" if folder.is_dir() else folder)
    if state["version"] != VERSION or "log" not in state or not folder.is_dir():
        raise InputError(f"--resume {folder}: give the folder of a run that this version began; the best.pt"
                         " of an older one works with --restore and --evaluate")  # fmt: skip
    options, free = state["options"], {"data"}
    if given.get("epochs", 0) > options["epochs"]:
        free.add("epochs")
    changes = {name: given[name] for name in TRAINING - free if name in given}
    refuse_changes(changes, options, f"the run in {folder}")
    options |= {name: given[name] for name in free if name in given}
    if options["data"] != "synthetic" and not Path(options["data"]).exists():
        raise InputError(f"--data {options['data']}, where the run had its pictures, does not exist:"
                         " say with --data where they are now")  # fmt: skip
    return options


def refuse_changes(given: dict, stored: dict, whose: str) -> None:
    """InputError that names both values of an option that contradicts a stored run."""
    for name, value in given.items():
        if value != stored[name]:
            raise InputError(f"{flag(name)} {value} contradicts {flag(name)} {stored[name]} of {whose}:"
                             " leave it out, or start a new run")  # fmt: skip


def data_path(text: str) -> str:
    """--data as a run keeps it: absolute, so that it can go on from anywhere; 'synthetic' means drawn
    faces."""
    if text != "synthetic":
        return os.path.abspath(text)
    if Path(text).exists():
        raise InputError(f"--data {text}: give ./{text} for the folder, or leave it out for drawn faces")
    return text


def choose_device(name: str) -> torch.device:
    """auto, cpu, cuda or mps -> a device that is there; under torchrun each process takes the GPU of its
    number."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        raise InputError(
            f"--device {name}: this machine or this build of PyTorch has none; leave the option out"
        )
    if name != "cuda":
        return torch.device(name)
    index, needed = (
        (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")) if launched() else (0, 1)
    )
    if needed > torch.cuda.device_count():
        raise InputError(
            f"{needed} processes for {torch.cuda.device_count()} GPUs: start one process for each GPU"
        )
    # float32 means float32: else PyTorch rounds the factors of a convolution to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def choose_precision(wanted: str, device: torch.device) -> str:
    """auto, bfloat16 or float32 -> one of the last two: bfloat16 where the device multiplies it faster than
    float32. Those are GPUs from Ampere on, CPUs with AMX, and AMD's with AVX512-BF16: on Intel's without AMX
    a step in bfloat16 takes 1.4 times as long. PyTorch before 2.11 cannot say: float32.
    """
    if not torch.amp.is_autocast_available(device.type):
        return "float32"
    if wanted != "auto":
        return wanted
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    fast = cpu.get("amx_bf16") or cpu.get("avx512_bf16") and "AMD" in cpu.get("cpu_name", "")
    fast = fast or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def launched() -> bool:
    """Whether torchrun started this process, as one of several. (RANK alone may be a leftover in the
    environment.)"""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def processes(device: torch.device):
    """Join the processes that torchrun started, if it did, and leave together at the end.

    PyTorch's threads for the group live on while anything holds it, and end the process with an error if
    they are still there at its exit. DistributedDataParallel holds it, and is held by cycles of its own:
    collect them first.
    """
    if launched():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2)
        )
    try:
        yield
        if dist.is_initialized():
            gc.collect()
            dist.barrier()  # the first process may still write its last files
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_job(given: dict) -> None:
    """Check what was asked for, then do it."""
    device_name = given.pop("device")
    job = choose_job(given)
    if "data" in given:
        given["data"] = data_path(given["data"])
    device = choose_device(device_name)
    if given.get("precision") == "bfloat16" != choose_precision("bfloat16", device):
        raise InputError(
            f"--precision bfloat16: this PyTorch has none for {device.type}; leave the option out"
        )
    if job in ("evaluate", "restore"):
        if not launched() or os.environ["RANK"] == "0":  # one process is enough
            {"evaluate": evaluate, "restore": restore_photos}[job](given, device)
        return
    with processes(device):
        if job == "compare":
            compare(given, device)
        else:
            options = resumed_options(given) if job == "resume" else complete_options(given, device)
            train_command(options, given, device)


MEMORY = "out of memory"


def reason(error: Exception) -> str | None:
    """What went wrong and what to do, for each cause; None for an error that is a bug."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "see whether it is there, and who may read and write it"
        return f"{place}{error.strerror or error}; {advice} (all that was saved before is intact)"
    memory = "out of memory|allocate memory|not enough memory"
    if isinstance(error, MemoryError) or re.search(memory, str(error)):
        return MEMORY
    return None


def main(argv: list[str] | None = None) -> None:
    """The program: a mistake of the user ends in one line and exit code 2, Ctrl-C in 130."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # the shell closed this stream (2>&-): without this, the next file would take its place
    os.close(spare)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name may have characters that the screen has not
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given = vars(parser().parse_args(argv))
        run_job(dict(given))
    except BrokenPipeError:  # the reader of our output has gone (| head): there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, OSError) as error:
        stop(reason(error), 2, everyone=isinstance(error, OSError))
    except (RuntimeError, MemoryError) as error:
        if not reason(error):
            raise
        stop(f"{reason(error)}: try a smaller --batch, --width or --res", 2, everyone=True)
    except KeyboardInterrupt:
        stop("stopped; start again with the same command", 130)


def stop(message: str, code: int, everyone: bool = False) -> None:
    """One line on stderr and the exit code. Of several processes, each sees the user's mistake and only the
    first tells it; what went wrong on one machine (`everyone`) is told by the process that saw it."""
    if everyone or not launched() or os.environ["RANK"] == "0":
        data.say("inpaint.py: " + re.sub(r"\s+", " ", message))
    sys.exit(code)


if __name__ == "__main__":
    main()
