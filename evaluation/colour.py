"""Colour science of the measured-albedo benchmark: spaces, CIELAB, the difference of two colours (CIEDE2000)."""
import numpy as np

# the constants of the published evaluation (MeasuredAlbedo/code, by the package colour-science): the matrices of the
# two standards as printed there, so that white comes out 1e-4 off; matrices from the primaries give other numbers
ADOBE_TO_XYZ = np.array([[0.57667, 0.18556, 0.18823],       # linear Adobe RGB (1998) -> CIE XYZ, D65
                         [0.29734, 0.62736, 0.07529],
                         [0.02703, 0.07069, 0.99134]])
XYZ_TO_SRGB = np.array([[3.2406, -1.5372, -0.4986],         # CIE XYZ -> linear sRGB (IEC 61966-2-1)
                        [-0.9689, 1.8758, 0.0415],
                        [0.0557, -0.2040, 1.0570]])
ADOBE_TO_SRGB = XYZ_TO_SRGB @ ADOBE_TO_XYZ
SRGB_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805],           # linear sRGB -> CIE XYZ (IEC 61966-2-1)
                        [0.2126, 0.7152, 0.0722],
                        [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.3127, 0.3290, 1 - 0.3127 - 0.3290]) / 0.3290                # D65 from its chromaticity, Y = 1


def linear_to_lab(rgb):
    """(..., 3) linear sRGB in [0, 1] -> CIELAB, white D65."""
    t = np.asarray(rgb, np.float64) @ SRGB_TO_XYZ.T / WHITE
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def ciede2000(lab1, lab2):
    """Colour difference CIEDE2000, unit weights (Sharma et al. 2005): (..., 3) x (..., 3) -> (...)."""
    (L1, a1, b1), (L2, a2, b2) = (np.moveaxis(np.asarray(lab, np.float64), -1, 0) for lab in (lab1, lab2))
    c7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1 + 0.5 * (1 - np.sqrt(c7 / (c7 + 25.0 ** 7)))
    c1, c2 = (np.hypot(stretch * a, b) for a, b in ((a1, b1), (a2, b2)))
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = h2 - h1 - 360 * np.sign(h2 - h1) * (np.abs(h2 - h1) > 180)
    dL = L2 - L1
    dC = c2 - c1
    dH = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))                    # 0 for grays
    L = (L1 + L2) / 2
    C = (c1 + c2) / 2
    total = h1 + h2
    h = np.where(np.abs(h1 - h2) <= 180, total / 2, np.where(total < 360, total / 2 + 180, total / 2 - 180))
    h = np.where(c1 * c2 == 0, total, h)                                        # one hue is undefined (0)
    T = 1 + sum(w * np.cos(np.radians(k * h + offset))
                for w, k, offset in ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63)))
    sL = 1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2)
    sC = 1 + 0.045 * C
    sH = 1 + 0.015 * C * T
    rotation = -np.sin(np.radians(60 * np.exp(-((h - 275) / 25) ** 2)))
    rotation = rotation * 2 * np.sqrt(C ** 7 / (C ** 7 + 25.0 ** 7))
    light = dL / sL
    chroma = dC / sC
    hue = dH / sH
    return np.sqrt(np.maximum(0, light ** 2 + chroma ** 2 + hue ** 2 + rotation * chroma * hue))
