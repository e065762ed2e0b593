"""File 2 of 4, models.py: what paints the hole (paper, sections 2.2, 2.3 and 2.4).

What you learn here: an activation function in one line; a U-Net, which sees the whole face at its bottom and
keeps every detail by its skips; DCGAN's discriminator; and what can be painted with no network at all.

All of it is the lesson, but for the last section (with no network), which can wait. Pictures are float
(B, 3, H, W) in [0, 1]; a mask (B or 1, 1, H, W) is 1 in the hole.

Try it:  python -c "import models; print(models.UNet(5, 32, 'swish'))"
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# --- Activation -----------------------------------------------------------------------------------


class Swish(nn.Module):
    """f(x) = x * sigmoid(x), any shape (section 2.4; Ramachandran et al. 2017).

    Like ReLU far from 0, but smooth, and with a slope below it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x * sigmoid(x)."""
        return x * torch.sigmoid(x)


ACTIVATIONS = {"relu": nn.ReLU, "swish": Swish}

# --- The U-Net ------------------------------------------------------------------------------------


def channels(depth: int, width: int, limit: int) -> list[int]:
    """Channels of each level: `width` at the top, twice as many at each step down, at most limit * width."""
    return [width * min(2**level, limit) for level in range(depth)]


class UNet(nn.Module):
    """The generator (section 2.2, figure 2; figure 3 with fewer levels).

    With depth 5, width 32 and limit 2, at 64 px:

        damaged + mask (B, 4, 64, 64) ────────────── keep ─────────────▶ + ──▶ sigmoid ──▶ (B, 3, 64, 64)
            ▼ down                                                       ▲ paint
        (B, 32, 32, 32) ───────────────── skip ─────────────▶ (B, 32 + 32, 32, 32)
            ▼ down                                                    ▲ up
        (B, 64, 16, 16) ────────────── skip ───────────▶ (B, 64 + 64, 16, 16)
            ▼ down                                               ▲ up
        (B, 64, 8, 8) ────────── skip ─────────────▶ (B, 64 + 64, 8, 8)
            ▼ down                                          ▲ up
        (B, 64, 4, 4) ─────── skip ───────────▶ (B, 64 + 64, 4, 4)
            ▼ down                                     ▲ up
        (B, 64, 2, 2) ─────────────────────────────────┘

    down = convolution 4 x 4 with stride 2, batch norm, activation; up = the same, transposed. Where a skip
    arrives, what came up and what was kept stand side by side (concatenated). Each number at the bottom
    depends on 94 rows and columns of the picture, so on the whole face; the skips keep every detail.

    Two things are not in the paper. The mask is a fourth channel: without it, nothing tells a white hole
    from a white wall. `keep`, a 1 x 1 convolution, leads each known pixel straight to the last layer.
    Batch norm is left out at the first level, where it would wash out the colours, and at the bottom, which
    has too few values for it.
    """

    def __init__(self, depth: int, width: int, act: str, limit: int = 2):
        super().__init__()
        levels = channels(depth, width, limit)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (fan_in, out) in enumerate(zip([4] + levels, levels)):
            self.down.append(self._block(nn.Conv2d, fan_in, out, act, norm=0 < level < depth - 1))
        for level in reversed(range(1, depth)):
            fan_in = levels[level] * (1 if level == depth - 1 else 2)
            self.up.append(self._block(nn.ConvTranspose2d, fan_in, levels[level - 1], act))
        self.paint = nn.ConvTranspose2d(levels[0] * (1 if depth == 1 else 2), 3, 4, stride=2, padding=1)
        self.keep = nn.Conv2d(4, 3, 1)
        self.start_by_keeping()

    @staticmethod
    def _block(convolution, fan_in: int, out: int, act: str, norm: bool = True) -> nn.Sequential:
        layers = [convolution(fan_in, out, 4, stride=2, padding=1, bias=not norm)]
        if norm:
            layers.append(nn.BatchNorm2d(out))
        return nn.Sequential(*layers, ACTIVATIONS[act]())

    def start_by_keeping(self) -> None:
        """Let `keep` begin as sigmoid(5 (x - 1/2)), nearly x, and as grey in the hole.

        So the first output is nearly the damaged picture, with a grey hole. The network then has to
        learn to fill, and not to copy. Without this it would start grey everywhere, and a discriminator would
        tell that from real pictures at once.
        """
        with torch.no_grad():
            self.keep.weight[:, :3, 0, 0] = 5 * torch.eye(3)
            # Where the mask is 1, take the white away. Else `paint` must, and it reaches over the hole's rim.
            self.keep.weight[:, 3] = -2.5
            self.keep.bias.fill_(-2.5)

    def forward(self, damaged: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """damaged (B, 3, H, W), mask (B or 1, 1, H, W) -> the whole picture, float32, in [0, 1]."""
        x = seen = torch.cat([damaged, mask.expand(len(damaged), 1, *damaged.shape[2:])], 1)
        skips = []
        for down in self.down:
            x = down(x)  # level k: (B, width * min(2^k, limit), H / 2^(k + 1), W / 2^(k + 1))
            skips.append(x)
        skips.pop()  # x is the bottom itself
        for up in self.up:
            x = torch.cat([up(x), skips.pop()], 1)
        return torch.sigmoid((self.paint(x) + self.keep(seen)).float())


# --- The discriminator, and what it sees ----------------------------------------------------------


class Discriminator(nn.Module):
    """DCGAN's discriminator (section 2.3; Radford et al. 2015). For pictures of 32 px and width 24:

        (B, 3, 32, 32) ─▶ (B, 24, 16, 16) ─▶ (B, 48, 8, 8) ─▶ (B, 96, 4, 4) ─▶ (B,)

    log2(side) - 2 convolutions 4 x 4 with stride 2, batch norm (not at the first) and leaky ReLU 0.2, then
    one over the remaining 4 x 4. It sees a picture and nothing else: it is not told where the hole is, nor
    what was in it. sigmoid(logit) = D(picture) is how real it looks.
    """

    def __init__(self, side: int, width: int):
        super().__init__()
        levels = channels(int(math.log2(side)) - 2, width, limit=16)
        self.down = nn.ModuleList()
        for level, (fan_in, out) in enumerate(zip([3] + levels, levels)):
            layers = [nn.Conv2d(fan_in, out, 4, stride=2, padding=1, bias=level == 0)]
            if level > 0:
                layers.append(nn.BatchNorm2d(out))
            self.down.append(nn.Sequential(*layers, nn.LeakyReLU(0.2)))
        self.last = nn.Conv2d(levels[-1], 1, 4)

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, 3, side, side) in [0, 1] -> logits, float32 (B,), and its features: what each level found."""
        x = picture * 2 - 1  # DCGAN's pictures run from -1 to 1
        features = []
        for down in self.down:
            x = down(x)  # level k: (B, width * 2^k, side / 2^(k + 1), side / 2^(k + 1))
            features.append(x)
        return self.last(x).flatten().float(), features


def middle(picture: torch.Tensor) -> torch.Tensor:
    """The central square of half the side: (B, C, H, W) -> (B, C, H / 2, W / 2).

    It holds the hole and nearly twice as much around it. A discriminator that sees no more than this gives
    all its attention to the hole.
    """
    height, width = picture.shape[2:]
    return picture[..., height // 4 : height - height // 4, width // 4 : width - width // 4]


def augment(picture: torch.Tensor, look: torch.Tensor) -> torch.Tensor:
    """A picture as the discriminator sees it: changed at random, anew at each look (Zhao et al. 2020).

        mean + b + c (grey - mean + s (x - grey)), then moved by u4 and u5 thirty-seconds of the side
        brightness b = u1 / 2, saturation s = 1 + u2, contrast c = 1 + u3 / 2

    picture x (B, 3, H, H) in [0, 1] -> the same shape, perhaps outside [0, 1]; black comes in from outside.
    grey is the mean of a pixel's three colours, mean that of the picture. u1 to u5 are uniform from -1 to 1,
    made of look (B, 5), uniform in [0, 1). Real and fake pictures get the same kinds of change, by other
    numbers, so the game stays fair, but no picture comes twice: none can be learnt by heart. The gradient
    flows through.

    Zhao et al. move by up to an eighth. Then a pattern passes that is painted at the same place in every
    face (README, chapter 5). Pictures of less than 32 px are not moved.
    """
    u = 2 * look - 1
    u1, u2, u3 = u[:, :3, None, None, None].unbind(1)
    brightness = u1 / 2
    saturation = 1 + u2
    contrast = 1 + u3 / 2
    grey = picture.mean(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    # Multiplied out, so that only two operations are as large as the picture.
    rest = contrast * (1 - saturation) * grey + (1 - contrast) * mean + brightness
    picture = contrast * saturation * picture + rest
    # Moved by matrices with at most a single 1 in each row: a slice would need the distance as a number of
    # Python's, and so would wait for the device.
    line = torch.arange(picture.shape[-1], device=picture.device)
    down, right = (u[:, 3:] * (len(line) // 32)).round()[..., None, None, None].unbind(1)  # (B, 1, 1, 1)
    rows = (line == line[:, None] + down).to(picture)
    columns = (line[:, None] == line + right).to(picture)
    return rows @ picture @ columns


def dcgan_init(network: nn.Module) -> None:
    """DCGAN's start (Radford et al. 2015, and their code).

    Convolutions ~ N(0, 0.02), batch norm ~ N(1, 0.02), no bias.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
            mean = 1.0 if isinstance(layer, nn.BatchNorm2d) else 0.0
            nn.init.normal_(layer.weight, mean, 0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# --- With no network: smooth filling, the mean, memory --------------------------------------------


def laplacian(x: torch.Tensor) -> torch.Tensor:
    """4 x - (the four neighbours), where a neighbour outside the picture equals the pixel itself."""
    p = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return 4 * x - p[..., :-2, 1:-1] - p[..., 2:, 1:-1] - p[..., 1:-1, :-2] - p[..., 1:-1, 2:]


def harmonic(damaged: torch.Tensor, mask: torch.Tensor, rounds: int = 40) -> torch.Tensor:
    """Fill the hole so that each of its pixels is the mean of its four neighbours: Laplace's equation.

    damaged (B, C, H, W), any range; mask (B or 1, 1, H, W), 1 in the hole; the same shape back, known
    pixels untouched. It is the final state of heat that flows in from the rim, the simplest of the models
    that the paper cites (Shen and Chan 2002). A first guess comes from the same problem at half the size.
    Conjugate gradients (Hestenes and Stiefel 1952) improve it: x is the filling, r what is not yet in
    balance, p the direction of the step, alpha its length.
    """
    mask = mask.expand(len(damaged), 1, *damaged.shape[2:])
    if not mask.any():
        return damaged
    x = torch.where(mask > 0, first_guess(damaged, mask, rounds), damaged)
    r = p = -laplacian(x) * mask
    error = r.square().sum((2, 3), keepdim=True)
    for _ in range(rounds):
        change = laplacian(p) * mask  # of r, for a step of length 1
        alpha = error / (p * change).sum((2, 3), keepdim=True).clamp(min=1e-20)
        x = x + alpha * p
        r = r - alpha * change
        before = error
        error = r.square().sum((2, 3), keepdim=True)
        p = r + error / before.clamp(min=1e-20) * p
    return x


def first_guess(damaged: torch.Tensor, mask: torch.Tensor, rounds: int) -> torch.Tensor:
    """The filling of the picture at half the size, enlarged.

    Where half the size is one pixel, it is the mean of the known pixels.
    """
    known = 1 - mask
    half = [(side + 1) // 2 for side in damaged.shape[2:]]
    if max(half) == 1:
        mean = (damaged * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
        return mean.expand_as(damaged)
    share = F.interpolate(known, half, mode="area")
    small = F.interpolate(damaged * known, half, mode="area") / share.clamp(min=1e-6)
    filled = harmonic(small, (share == 0).to(damaged), rounds)
    return F.interpolate(filled, damaged.shape[2:], mode="bilinear")


def mean_face(training: torch.Tensor) -> torch.Tensor:
    """The mean of the training pictures, uint8 (N, 3, H, W) -> float (1, 3, H, W) in [0, 1]."""
    total = sum(part.double().sum(0, keepdim=True) for part in training.split(100))
    return (total / len(training) / 255).float()


def nearest_face(
    damaged: torch.Tensor, mask: torch.Tensor, training: torch.Tensor, part: int = 512
) -> torch.Tensor:
    """For each of (B, 3, H, W) the training picture with the nearest known pixels: the paper's "memory".

    mask (1, 1, H, W); training uint8 (N, 3, H, W), taken a part at a time. It uses that
    |a - b|^2 = |a|^2 - 2 a b + |b|^2, where |a|^2 is the same for all b.
    """
    known = (mask[0] == 0).expand(damaged.shape[1:]).flatten()
    ours = damaged.flatten(1)[:, known]  # (B, known values)
    distances = []  # less |damaged|^2, (B, part) each
    for theirs in training.split(part):
        theirs = theirs.to(damaged.device).flatten(1)[:, known].float() / 255
        distances.append(theirs.square().sum(1) - 2 * ours @ theirs.T)
    chosen = torch.cat(distances, 1).argmin(1)
    return training[chosen.to(training.device)].to(damaged.device).float() / 255


def without_training(training: torch.Tensor, mask: torch.Tensor) -> dict:
    """{name: function from damaged to output, (B, 3, H, W) both}: what a network has to beat."""
    mean = mean_face(training).to(mask.device)
    return {
        "white hole": lambda damaged: damaged,
        "smooth filling": lambda damaged: harmonic(damaged, mask),
        "mean face": lambda damaged: mean.expand_as(damaged),
        "nearest face": lambda damaged: nearest_face(damaged, mask, training),
    }
