"""File 3 of 4, losses.py: what a picture is judged by (paper, sections 2.2.1, 2.3 and table 1).

What you learn here: the distances L1 and MSE; SSIM, which compares neighbourhoods instead of pixels; PSNR
and how not to get it wrong; the two sides of the adversarial game; how to measure whether a picture looks
real; and how `--loss "30*l1+adversarial"` becomes a sum of terms.

All of it is the lesson. Pictures are float (B, 3, H, W) in [0, 1]; a mask (B or 1, 1, H, W) is 1 in the hole.

Try it:  python -c "import torch, losses; x = torch.rand(1, 3, 64, 64); print(losses.ssim(x, 1 - x))"
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

# --- Distances, pixel by pixel --------------------------------------------------------------------


def weighted_mean(error: torch.Tensor, mask: torch.Tensor, hole_weight: float) -> torch.Tensor:
    """The mean of an error (B, 3, H, W) in which each pixel of the hole counts `hole_weight` times -> ().

    1 is the plain mean over the whole picture, as in the paper; 0 leaves only the known part.
    """
    weight = 1 + (hole_weight - 1) * mask
    return (error * weight).sum() / weight.expand_as(error).sum()


def l1(output, image, mask, hole_weight: float = 1) -> torch.Tensor:
    """mean |output - image| -> (), table 1. It is lowest at the median of what is possible."""
    return weighted_mean((output - image).abs(), mask, hole_weight)


def mse(output, image, mask, hole_weight: float = 1) -> torch.Tensor:
    """mean (output - image)^2 -> (), section 2.2.1. It is lowest at the mean of what is possible."""
    return weighted_mean((output - image).square(), mask, hole_weight)


# --- SSIM: distance, neighbourhood by neighbourhood -----------------------------------------------

TAPS, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def gaussian_window() -> torch.Tensor:
    """exp(-d^2 / (2 sigma^2)) at the distances d = -5 ... 5, scaled to the sum 1 -> float64 (11,)."""
    distance = torch.arange(TAPS, dtype=torch.float64) - (TAPS - 1) / 2
    window = torch.exp(-distance.square() / (2 * SIGMA**2))
    return window / window.sum()


@functools.lru_cache(maxsize=16)
def band(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The Gaussian filter along an axis as a matrix (size, size - 10): in column j the window starts at j."""
    place = torch.arange(size)[:, None] - torch.arange(size - TAPS + 1)[None, :]
    window = gaussian_window()[place.clamp(0, TAPS - 1)]
    return torch.where((place >= 0) & (place < TAPS), window, 0.0).to(device, dtype)


def blur(z: torch.Tensor) -> torch.Tensor:
    """The Gaussian mean in every whole window: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    rows, columns = (band(size, z.dtype, z.device) for size in z.shape[2:])
    return rows.T @ z @ columns


def ssim(x: torch.Tensor, y: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004; section 2.2.1): (B, C, H, W) twice -> (B,), at most 1.

        SSIM = (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2))
        C1 = (0.01 L)^2, C2 = (0.03 L)^2, L = data_range

    mx, my, vx, vy and cov are means, variances (population) and covariance in a Gaussian window of 11 x 11
    pixels, sigma 1.5, at every place where the whole window fits; the values are averaged over places and
    channels. The same convention as scikit-image (gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False), TensorFlow, pytorch-msssim and piq. ValueError if shapes differ or a side
    is below 11 pixels.

    Why it is fast: the Gaussian window is a product of one along the rows and one along the columns, and
    sliding a window along an axis is a product with a banded matrix, so `blur` is two matrix products. The
    formula needs vx + vy but neither alone, so four blurred maps are enough. Why it is exact: E[x^2] -
    E[x]^2 loses its digits where x is bright and uniform. Variances do not change when a constant is
    subtracted, so we subtract each picture's mean first. It is float32 under autocast too; float64 stays.
    """
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(
            f"ssim takes two tensors of one shape (B, C, H, W), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if min(x.shape[-2:]) < TAPS:
        raise ValueError(f"ssim needs pictures of at least {TAPS} x {TAPS} pixels, not {tuple(x.shape[-2:])}")
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x.device.type):
        x, y = x.to(exact), y.to(exact)
        x0, y0 = (z.detach().mean((2, 3), keepdim=True) for z in (x, y))
        x, y = x - x0, y - y0
        mx, my = blur(x), blur(y)
        variances = blur(x * x + y * y) - mx * mx - my * my  # vx + vy
        covariance = blur(x * y) - mx * my
        mx, my = mx + x0, my + y0
        luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
        structure = (2 * covariance + c2) / (variances + c2)
        return (luminance * structure).mean((1, 2, 3))


def without_autocast(device_type: str):
    """A context in which nothing is rounded to bfloat16. On a Mac, PyTorch 2.4 has no autocast at all."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def dssim(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(1 - SSIM) / 2, averaged over the batch -> () (section 2.2.1): 0 for equal pictures."""
    return (1 - ssim(output, image).mean()) / 2


# --- The adversarial game -------------------------------------------------------------------------


def discriminator_loss(
    real_logit: torch.Tensor, fake_logit: torch.Tensor, smooth: float = 0.0
) -> torch.Tensor:
    """-[(1 - s) log D(real) + s log(1 - D(real)) + log(1 - D(fake))], averaged, from logits (B,) -> ().

    The discriminator's side of the game (section 2.3; Goodfellow et al. 2014). D = sigmoid(logit), so -log D
    = softplus(-logit), and -log(1 - D) = softplus(logit) = softplus(-logit) + logit: neither overflows. With
    `smooth` s, the target for real pictures is 1 - s (Salimans et al. 2016): a discriminator that is never
    quite certain goes on teaching.
    """
    return F.softplus(-real_logit).mean() + smooth * real_logit.mean() + F.softplus(fake_logit).mean()


def generator_loss(fake_logit: torch.Tensor) -> torch.Tensor:
    """-log D(fake), averaged, from logits (B,) -> (): steep even while the discriminator wins."""
    return F.softplus(-fake_logit).mean()


def feature_loss(fake_features: list[torch.Tensor], real_features: list[torch.Tensor]) -> torch.Tensor:
    """sum over levels of mean |feature of the fake - feature of the original| -> ().

    Both are lists of (B, C, H, W) from models.Discriminator, one for each level. L1 asks for the same
    pixels, the discriminator for something real; this asks for the same things that the discriminator has
    learned to look at. (Salimans et al. 2016; Wang et al. 2018, pix2pixHD)
    """
    pairs = zip(fake_features, real_features, strict=True)
    return sum((fake.float() - real.float()).abs().mean() for fake, real in pairs)


# --- The grammar of --loss ------------------------------------------------------------------------

TERMS = ("l1", "mse", "dssim", "known", "adversarial", "features")  # `known` is L1 outside the hole alone


def parse_loss(text: str) -> dict[str, float]:
    """'mse+dssim' or '30*l1+adversarial' -> {term: weight}.

    With no weight anywhere each of n terms counts 1/n, so 'mse+dssim' is (MSE + DSSIM) / 2, the paper's;
    with a weight anywhere, bare terms count 1. ValueError for an unknown or doubled term, a weight that is
    not above 0, or features without adversarial.
    """
    weights: dict[str, float] = {}
    parts = [part.strip() for part in text.split("+")]
    bare = 1.0 if "*" in text else 1.0 / len(parts)
    for part in parts:
        weight, _, term = part.rpartition("*")
        term = term.strip()
        if term not in TERMS or term in weights:
            problem = "given twice" if term in weights else "unknown"
            raise ValueError(
                f"term {term!r} is {problem}: a loss is a sum of {', '.join(TERMS)}, as in 30*l1+adversarial"
            )
        try:
            weights[term] = float(weight) if "*" in part else bare
        except ValueError:
            weights[term] = math.nan
        if not 0 < weights[term] < math.inf:
            raise ValueError(f"weight {weight!r} of {term} must be above 0, as in 30*l1+adversarial")
    if "features" in weights and "adversarial" not in weights:
        raise ValueError("features are the discriminator's: add adversarial, which brings one")
    return weights


def distances(
    weights: dict, output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, hole_weight: float
) -> dict:
    """{term: value ()} of every term in `weights` that compares the output with the original."""
    found = {}
    if "l1" in weights:
        found["l1"] = l1(output, image, mask, hole_weight)
    if "mse" in weights:
        found["mse"] = mse(output, image, mask, hole_weight)
    if "dssim" in weights:
        found["dssim"] = dssim(output, image)
    if "known" in weights:
        found["known"] = l1(output, image, mask, 0)
    return found


# --- PSNR: the metric of table 1, done right ------------------------------------------------------


def psnr(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """10 log10(1 / MSE) in decibels for pictures in [0, 1]: (B, C, H, W) twice -> (B,), at most 100.

    With a mask (B or 1, 1, H, W) only the pixels where it is 1 count. Equal pictures have 100 dB and not
    infinity: one of them would make every mean infinite. Anything but float pictures of one shape in [0, 1]
    is a ValueError: a score of [0, 1] against [0, 255] is probably how the paper's table came to 6 dB.
    """
    for name, picture in (("first", x), ("second", y)):
        if not picture.is_floating_point():
            raise ValueError(
                f"psnr takes float pictures in [0, 1]; the {name} one is {picture.dtype}: divide by 255"
            )
        low, high = picture.aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails every comparison
            raise ValueError(
                f"psnr takes pictures in [0, 1]; the {name} one runs from {low:.4g} to {high:.4g}"
            )
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(
            f"psnr takes two tensors of one shape (B, C, H, W), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    error = (x - y).float().square() if x.dtype != torch.float64 else (x - y).square()
    weight = torch.ones_like(error) if mask is None else mask.expand_as(error)
    mean = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return (-10 * torch.log10(mean)).clamp(max=100)


# --- Realism: does it look like a photograph? -----------------------------------------------------


def specks(picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How many specks of colour are in the hole: (B, 3, H, W) in [0, 1], mask (B or 1, 1, H, W) -> (B,).

    A speck is a pixel whose R - G or B - G differs by more than 0.08 from the median of its 3 x 3.
    Photographs have hardly any: skin, hair and eyes change their colour from place to place, not from pixel
    to pixel.
    """
    colour = picture[:, [0, 2]] - picture[:, 1:2]  # (B, 2, H, W)
    around = F.pad(colour, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    far = (colour - around.flatten(4).median(4).values).abs() > 0.08
    return (far.any(1, keepdim=True) * mask).sum((1, 2, 3))


PER_PICTURE = ("psnr_output", "psnr_restored", "psnr_hole", "ssim_restored", "speckled")


def measure(
    output: torch.Tensor, restored: torch.Tensor, image: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """One value a picture of each of PER_PICTURE -> (5, B).

    psnr_output: the whole output, which the paper's table meant to show. psnr_hole: inside the hole only.
    psnr_restored: the known pixels are the original's, so it is psnr_hole + 10 log10(1 / s), where s is the
    hole's share of the picture. speckled: 1 for a picture with five specks or more, so that the mean is the
    share of such pictures.
    """
    psnrs = psnr(output, image), psnr(restored, image), psnr(output, image, mask)
    speckled = (specks(restored, mask) >= 5).float()
    return torch.stack([*psnrs, ssim(restored, image), speckled])


PATCHES = 16384  # so many of each set are compared by `swd`


def swd(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> float:
    """The sliced Wasserstein distance between patches of pictures x and of originals y, (N, 3, H, W) each.

        SWD = mean over directions d and ranks r of |sorted <patches of x, d>[r] - sorted <those of y, d>[r]|

    PATCHES patches of 7 x 7 pixels that touch the hole, mask (1, 1, H, W), are drawn at the same places
    from both sets, and each channel is scaled by the mean and deviation of the original patches. 256 random
    directions of length 1 project them; sorting makes it a distance between distributions, not between
    pairs: PSNR asks whether the right face was painted, this asks whether faces like these exist. 0 for the
    same set; places and directions come from a fixed seed. (Rabin et al. 2011; Karras et al. 2018 use it
    for images.)
    """
    size = 7
    seed = torch.Generator().manual_seed(0)
    touches = F.max_pool2d(mask, size, 1)[0, 0].cpu()  # 1 at the corner of each patch that touches the hole
    rows, columns = touches.nonzero().T
    drawn = torch.randint(len(x) * len(rows), (PATCHES,), generator=seed)
    picture, place = drawn % len(x), drawn // len(x)
    directions = F.normalize(torch.randn(3 * size * size, 256, generator=seed), dim=0).to(x.device)

    def patches(images):  # (PATCHES, 3, 7, 7)
        return images.unfold(2, size, 1).unfold(3, size, 1)[picture, :, rows[place], columns[place]]

    deviation, mean = torch.std_mean(patches(y), (0, 2, 3), keepdim=True)

    def projections(images):  # (256, PATCHES), each row in order
        scaled = (patches(images) - mean) / deviation.clamp(min=1e-6)
        return (directions.T @ scaled.flatten(1).T).sort(1)[0]

    return (projections(x) - projections(y)).abs().mean().item()
