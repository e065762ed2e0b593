"""Chapter 3, losses.py: what a picture is judged by (paper, sections 2.2.1, 2.3 and table 1).

What you learn here: the two distances L1 and MSE; SSIM, which compares neighbourhoods and not pixels,
and how two matrix products compute it fast; PSNR and how not to get it wrong; the two sides of the adversarial
game; and how `--loss "100*l1+adversarial"` becomes a sum of terms.

Pictures are float (B, 3, H, W) in [0, 1]; a mask (B or 1, 1, H, W) is 1 in the hole.

Try it:  python -c "import torch, losses; x = torch.rand(1, 3, 64, 64); print(losses.ssim(x, 1 - x))"
"""

import functools
import math

import torch
import torch.nn.functional as F

# --- Distances, pixel by pixel --------------------------------------------------------------------


def weighted_mean(error: torch.Tensor, mask: torch.Tensor, hole_weight: float) -> torch.Tensor:
    """The mean of an error (B, 3, H, W) in which each pixel of the hole counts `hole_weight` times -> ().

    With 1 it is the plain mean over the whole picture, the paper's.
    """
    weight = 1 + (hole_weight - 1) * mask
    return (error * weight).sum() / weight.expand_as(error).sum()


def l1(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, hole_weight: float = 1) -> torch.Tensor:
    """mean |output - image| -> (): the U-Net's loss in table 1. Its best answer to doubt is the median face."""
    return weighted_mean((output - image).abs(), mask, hole_weight)


def mse(output: torch.Tensor, image: torch.Tensor, mask: torch.Tensor, hole_weight: float = 1) -> torch.Tensor:
    """mean (output - image)^2 -> (), section 2.2.1. Its best answer to doubt is the mean face."""
    return weighted_mean((output - image).square(), mask, hole_weight)


# --- SSIM: distance, neighbourhood by neighbourhood -----------------------------------------------

TAPS, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def gaussian_window() -> torch.Tensor:
    """exp(-d^2 / (2 sigma^2)) at the distances d = -5 ... 5, scaled to the sum 1 -> float64 (11,)."""
    distance = torch.arange(TAPS, dtype=torch.float64) - (TAPS - 1) / 2
    window = torch.exp(-distance.square() / (2 * SIGMA**2))
    return window / window.sum()


@functools.lru_cache(maxsize=16)
def _band(windows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The filter along an axis as a matrix (windows + 10, windows): column j is the Gaussian window, shifted down by j."""
    places = torch.arange(windows + TAPS - 1)[:, None] - torch.arange(windows)[None, :]  # row - column
    inside = (places >= 0) & (places < TAPS)
    return torch.where(inside, gaussian_window()[places.clamp(0, TAPS - 1)], 0.0).to(device, dtype)


def _pieces(windows: int, like: torch.Tensor, most: int = 40):
    """Yield (start, count, band): a long axis is cut, for a band is mostly zeros and the zeros cost time too."""
    for start in range(0, windows, most):
        count = min(most, windows - start)
        yield start, count, _band(count, like.dtype, like.device)


def _blur(z: torch.Tensor) -> torch.Tensor:
    """The Gaussian mean in every whole window: (B, C, H, W) -> (B, C, H - 10, W - 10), a matrix product an axis."""
    rows = [z[..., s : s + n + TAPS - 1] @ band for s, n, band in _pieces(z.shape[3] - TAPS + 1, z)]
    z = torch.cat(rows, 3) if len(rows) > 1 else rows[0]
    columns = [band.T @ z[:, :, s : s + n + TAPS - 1] for s, n, band in _pieces(z.shape[2] - TAPS + 1, z)]
    return torch.cat(columns, 2) if len(columns) > 1 else columns[0]


def _spread(g: torch.Tensor) -> torch.Tensor:
    """The transpose of _blur: (B, C, H - 10, W - 10) -> (B, C, H, W). It carries gradients back."""
    for axis in (2, 3):
        parts = [(s, band @ g[:, :, s : s + n] if axis == 2 else g[..., s : s + n] @ band.T) for s, n, band in _pieces(g.shape[axis], g)]
        if len(parts) == 1:
            g = parts[0][1]
            continue
        sizes = [size + (TAPS - 1) * (d == axis) for d, size in enumerate(g.shape)]
        g = g.new_zeros(sizes)
        for start, part in parts:  # neighbours overlap by 10 pixels
            g.narrow(axis, start, part.shape[axis]).add_(part)
    return g


class _SSIM(torch.autograd.Function):
    """The formula of `ssim`, and its derivative by hand: half the time of what autograd would do."""

    @staticmethod
    def forward(ctx, x, y, c1, c2):
        """SSIM = luminance * structure, one value a picture."""
        x0, y0 = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
        x, y = x - x0, y - y0
        mx, my = _blur(x), _blur(y)
        variances = (_blur(x.square().addcmul_(y, y)) - mx.square()).addcmul_(my, my, value=-1).clamp_(min=0)  # vx + vy
        covariance = _blur(x * y).addcmul_(mx, my, value=-1)
        px, py = mx + x0, my + y0  # the means of the pictures as they came
        below, spread = px.square().addcmul_(py, py).add_(c1), variances.add_(c2)
        luminance = (px * py).mul_(2).add_(c1).div_(below)
        structure = covariance.mul_(2).add_(c2).div_(spread)
        ctx.save_for_backward(x, y, mx, my, px, py, below, spread, luminance, structure)
        return (luminance * structure).mean((1, 2, 3))

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is refused, not wrong
    def backward(ctx, gradient):
        """By the chain rule through cov = E[xy] - mx my and v = E[x^2 + y^2] - mx^2 - my^2; symmetric in x and y."""
        x, y, mx, my, px, py, below, spread, luminance, structure = ctx.saved_tensors
        each = (gradient / luminance[0].numel())[:, None, None, None]  # of every value in the mean
        by_cov = luminance * (2 * each) / spread
        by_var = by_cov * structure / -2
        pull = structure * (2 * each) / below

        def toward(a, b, ma, mb, pa, pb):
            by_mean = (pull * torch.addcmul(pb, luminance, pa, value=-1)).addcmul_(ma, by_var, value=-2).addcmul_(mb, by_cov, value=-1)
            return _spread(by_mean).addcmul_(a, wide_var, value=2).addcmul_(b, wide_cov)

        with torch.autocast(x.device.type, enabled=False):
            wide_cov, wide_var = _spread(by_cov), _spread(by_var)
            return (
                toward(x, y, mx, my, px, py) if ctx.needs_input_grad[0] else None,
                toward(y, x, my, mx, py, px) if ctx.needs_input_grad[1] else None,
                None,
                None,
            )


def ssim(x: torch.Tensor, y: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004; section 2.2.1): (B, C, H, W) twice -> (B,), 1 for equal pictures.

        SSIM = (2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2)),  C1 = (0.01 L)^2, C2 = (0.03 L)^2

    mx, my, vx, vy and cov are means, variances (population) and covariance in a Gaussian window of 11 x 11 pixels,
    sigma 1.5, at every place where the whole window fits; the values are averaged over places and channels. The
    same convention as scikit-image (gaussian_weights=True, sigma=1.5, use_sample_covariance=False), TensorFlow,
    pytorch-msssim and piq.

    Why the code above is this and still fast: the Gaussian window is a product of one along the rows and one along the
    columns, and sliding a window along an axis is a product with a banded matrix; so `_blur` is two matrix products.
    The formula needs vx + vy but neither alone, so four blurred maps do. Why it is exact: E[x^2] - E[x]^2 loses its
    digits where x is large and even; variances stay the same when a constant is subtracted from a picture first, so
    each channel's mean is. It is float32 also under autocast (float64 stays). ValueError if shapes differ or a side is
    below 11 pixels.
    """
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(f"ssim takes two tensors of one shape (B, C, H, W), not {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[-2:]) < TAPS:
        raise ValueError(f"ssim needs pictures of at least {TAPS} x {TAPS} pixels, not {tuple(x.shape[-2:])}")
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        return _SSIM.apply(x.to(exact), y.to(exact), (K1 * data_range) ** 2, (K2 * data_range) ** 2)


def dssim(output: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """(1 - SSIM) / 2, averaged over the batch -> (): the paper's loss, 0 for equal pictures (section 2.2.1)."""
    return (1 - ssim(output, image).mean()) / 2


# --- PSNR: the metric of table 1, done right ------------------------------------------------------


def psnr(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """10 log10(1 / MSE) in decibels for pictures in [0, 1]: (B, C, H, W) twice -> (B,), inf for equal pictures.

    With a mask (B or 1, 1, H, W) only the pixels where it is 1 count. Anything but float pictures of one shape in
    [0, 1] is a ValueError: scoring [0, 1] against [0, 255] is very probably how the paper's table came to 6 dB.
    """
    for name, picture in (("first", x), ("second", y)):
        if not picture.is_floating_point():
            raise ValueError(f"psnr takes float pictures in [0, 1]; the {name} one is {picture.dtype}: divide by 255")
        low, high = picture.aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails every comparison
            raise ValueError(f"psnr takes pictures in [0, 1]; the {name} one runs from {low:.4g} to {high:.4g}")
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(f"psnr takes two tensors of one shape (B, C, H, W), not {tuple(x.shape)} and {tuple(y.shape)}")
    error = (x - y).float().square() if x.dtype != torch.float64 else (x - y).square()
    if mask is None:
        mean = error.mean((1, 2, 3))
    else:
        weight = mask.expand_as(error)
        mean = (error * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return -10 * torch.log10(mean)


# --- The adversarial game -------------------------------------------------------------------------


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, smooth: float = 0.0) -> torch.Tensor:
    """-[log D(x) + log(1 - D(G))], averaged, from logits (B,): the discriminator's side (section 2.3, [1]).

    D = sigmoid(logit), so -log D(x) = softplus(-logit), which never overflows. `smooth` asks for 1 - smooth, not 1,
    of real pictures only (Salimans et al. 2016): a discriminator that is never quite sure goes on teaching.
    """
    return F.softplus(-real).mean() + smooth * real.mean() + F.softplus(fake).mean()


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """-log D(G), averaged, from logits (B,): the non-saturating form, strong just where the discriminator wins."""
    return F.softplus(-fake).mean()


# --- The grammar of --loss ------------------------------------------------------------------------

TERMS = ("l1", "mse", "dssim", "adversarial")


def parse_loss(text: str) -> dict[str, float]:
    """'mse+dssim' or '100*l1+adversarial' -> {term: weight}.

    With no weight anywhere each of n terms counts 1/n, so 'mse+dssim' is the paper's (MSE + DSSIM) / 2; with a weight
    anywhere, bare terms count 1. ValueError for an unknown or doubled term or a weight that is not above 0.
    """
    weights: dict[str, float] = {}
    parts = [part.strip() for part in text.split("+")]
    bare = 1.0 if "*" in text else 1.0 / len(parts)
    for part in parts:
        weight, _, term = part.rpartition("*")
        term = term.strip()
        if term not in TERMS or term in weights:
            problem = "given twice" if term in weights else "unknown"
            raise ValueError(f"term {term!r} is {problem}: a loss is a sum of {', '.join(TERMS)}, as in 100*l1+adversarial")
        try:
            weights[term] = float(weight) if "*" in part else bare
        except ValueError:
            weights[term] = math.nan
        if not 0 < weights[term] < math.inf:
            raise ValueError(f"weight {weight!r} of {term} must be a number above 0, as in 100*l1+adversarial")
    return weights
