"""The CRF of the paper: every pixel of an image connected to every other one (Sec. 4.1, Eq. 9).

Mean field and its way back are those of meanfield.py; here are the features: positions, and
positions with colours.
Legend: S the shape of the image, C its channels, D its dimensions; L labels; M kernels.
"""
import numpy as np

from .arrays import array_module
from .inputs import check_image
from .meanfield import FeatureCRF


class DenseCRF(FeatureCRF):
    """The fully connected CRF of an image: a kernel of position, and one of position and colour.

    forward, backward and all else as in FeatureCRF, with an image (*S, C) for the features: uint8
    or float, in the order of sigma_bilateral; RGB in 0-255 for the default widths.

    sigma_position: widths (x, y) in pixels, or one for all; None leaves this kernel out, and its
        entry of w.
    sigma_bilateral: widths (x, y, colour...), pixels and colour units, one for each channel of the
        images; or a pair (pixels, colour) for `channels` of them.  None leaves this kernel out.
    dimensions: 2 for photographs (H, W, C), 1 for signals (W, C), 3 for volumes (Z, H, W, C), whose
        widths are in the order (x, y, z, colour...).

    params, grads: "w" (M,) or (M, L, L), "log_sigma_position" (D,), "log_sigma_bilateral" (D+C,).
    """
    OPTIONS = *FeatureCRF.OPTIONS, "dimensions"
    __slots__ = ("dimensions",)

    def __init__(self, n_labels, *, w=(3., 10.), sigma_position=3., sigma_bilateral=(80., 13.),
                 iterations=5, normalization="symmetric", exclude_self=True, damping=0.,
                 exact=False, dimensions=2, channels=3):
        self.dimensions = D = dimensions
        sigmas = {"position": sigma_position, "bilateral": sigma_bilateral}
        if np.ndim(sigma_position) == 0 and sigma_position is not None:
            sigmas["position"] = [sigma_position] * D
        if np.shape(sigma_bilateral) == (2,):
            sigmas["bilateral"] = [sigma_bilateral[0]] * D + [sigma_bilateral[1]] * channels
        used = [name for name in sigmas if sigmas[name] is not None]
        for name in used:
            length = np.size(sigmas[name])
            if length <= D if name == "bilateral" else length != D:
                more = " and each channel" if name == "bilateral" else ""
                raise ValueError(f"sigma_{name}: found {length} widths, expected one for each of "
                                 f"{D} dimensions{more}")
        w = [w] if np.isscalar(w) else list(w)
        if len(w) == 2:                          # of both kernels, whichever are used
            w = [w_m for w_m, name in zip(w, sigmas) if name in used]
        super().__init__(n_labels, w=w, sigmas={name: sigmas[name] for name in used},
                         iterations=iterations, normalization=normalization, damping=damping,
                         exclude_self=exclude_self, exact=exact)

    @classmethod
    def _build(cls, options, params):
        sigmas = {f"sigma_{name}": np.exp(params[f"log_sigma_{name}"])
                  if f"log_sigma_{name}" in params else None for name in ("position", "bilateral")}
        return cls(w=params["w"], **sigmas, **options)

    def _kernels(self, image, scores, earlier=None):
        xp, shape = array_module(scores), scores.shape[:-1]
        if len(shape) != self.dimensions:
            raise ValueError(f"scores: found shape {scores.shape}, expected {self.dimensions} "
                             "dimensions and labels")
        channels = self.params.get("log_sigma_bilateral", np.zeros(0)).size - len(shape)
        check_image(image, (*shape, channels if channels > 0 else "C"))
        image = xp.asarray(image)
        grid = xp.meshgrid(*(xp.arange(n, dtype=scores.dtype) for n in shape), indexing="ij")
        position = xp.stack(grid[::-1], axis=-1)                             # (*S, D): x first
        features = {"log_sigma_position": position, "log_sigma_bilateral": xp.concatenate(
            [position, image.astype(scores.dtype)], axis=-1)}                # (*S, D+C)
        return super()._kernels([features[name] for name in self._widths()], scores, earlier)
