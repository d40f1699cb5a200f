"""SYNTHETIC short-axis cardiac "MR" volumes: drawn by a program, no patient is behind any of them.

The phantom exists so that the whole method can be run and tested without data one must register
for. It imitates what makes the real task hard with few labels: hearts differ in size, shape and
orientation, scans in contrast, intensity scale, coil shading, blur and noise, and the chest holds
things that look like a heart. It says nothing about how well a model does on patients.

Every heart boundary is a radius R(theta) about the left ventricle's axis, one table per height, so
a point belongs to the first of LV < MYO < RV whose radius exceeds its own. Points are sampled finer
than pixels and averaged (partial volume); a pixel's label is the majority of its points.

The constants below are ranges (low, high) drawn uniformly once per volume unless said otherwise.
To make the task harder, widen the appearance ranges first: they cost a model trained on one volume
much more than one trained on many.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

BACKGROUND, RV, MYO, LV = 0, 1, 2, 3

SEED = 2112_09645

# Sampling of the scan.
NUM_SLICES = (5, 6, 7, 8, 9, 10)
NUM_SLICES_ODDS = (0.05, 0.10, 0.20, 0.25, 0.25, 0.15)
PIXEL_MM = (1.6, 2.6)
ANISOTROPIC_FRACTION = 0.12
ANISOTROPY = (1.15, 1.4)
SLICE_MM = (8.0, 10.0)
SLICE_THICKNESS = 0.7  # of the slice spacing; the rest is gap
MATRIX = (60, 100)
FIELD_MM = (136.0, 180.0)
SQUARE_FRACTION = 0.4
SUPERSAMPLING = 3
SUBSLICES = 3  # odd, so that no pixel is tied between being heart and not

# Heart, in mm at the base unless said otherwise. Heights: 0 apex of the cavity, 1 base.
HALF_FIELD_MM = 60.0  # no outline of a label reaches further from the image centre along an axis
APEX_HEIGHT = (-0.15, 0.28)  # of the first slice
BASE_HEIGHT = (0.86, 1.0)  # of the last slice
LV_RADIUS_MM = (19.0, 30.0)
WALL_MM = (9.0, 13.0)
WALL_VARIATION = 0.15  # relative, around the circumference
ELLIPTICITY = (0.0, 0.14)  # relative amplitude of the second harmonic of the radius
RV_DEPTH_MM = (19.0, 36.0)
RV_HALF_ANGLE_DEG = (48.0, 82.0)
RV_APEX_HEIGHT = (0.05, 0.35)
RV_SKEW = (-0.45, 0.45)
ROTATION_DEG = (-50.0, 50.0)
OFFSET_MM = (-16.0, 16.0)
TILT_MM = (-9.0, 9.0)  # drift of the axis from apex to base
BREATHING_MM = 0.9  # standard deviation of one slice's shift against the others
OPEN_BASE_FRACTION = 0.15
LEAFLET_MM = 2.5
PAPILLARY_RADIUS_MM = (2.5, 6.0)

# Appearance, relative to the LV blood pool.
MYO_LEVEL = (0.22, 0.60)
RV_CONTRAST = (-0.2, 0.2)  # RV minus LV blood, relative to LV blood minus myocardium
LIVER_TO_MYO = (0.7, 1.6)
MUSCLE_TO_MYO = (0.6, 1.3)
LUNG_LEVEL = (0.02, 0.25)
FAT_LEVEL = (0.5, 1.6)
FAT_MM = (1.0, 5.0)  # mean thickness of the fat around the heart
VESSEL_LEVEL = (0.8, 1.25)  # per vessel
NUM_VESSELS = (2, 5)
NUM_LOBES = (2, 5)  # other soft tissue and fat near the heart
LOBE_LEVEL = (0.15, 1.1)  # per lobe
NUM_LOOKALIKES = (1, 3)
LOOKALIKE_RADIUS_MM = (6.0, 12.0)
LOOKALIKE_WALL_MM = (4.0, 7.0)
STOMACH_FRACTION = 0.6
DISC_STRETCH = 1.3  # largest; the ratio of the axes is its square
DISC_DRIFT_MM = 8.0  # standard deviation of the shift over the whole stack

# Scanner.
BIAS = (0.1, 0.3)  # standard deviation of the log of the coil's shading
TEXTURE = (0.02, 0.09)
BLUR_MM = (0.5, 1.2)
CONTRAST_TO_NOISE = (7.0, 18.0)  # blood against myocardium
GHOST = (0.0, 0.07)
SLICE_GAIN = 0.06  # standard deviation of the log
LOG10_SCALE = (0.5, 3.5)

_NUM_ANGLES = 1440


class PhantomVolume(NamedTuple):
    """image [X, Y, S] float32 >= 0; label [X, Y, S] uint8; spacing_mm (dx, dy, dz)."""

    image: np.ndarray
    label: np.ndarray
    spacing_mm: tuple[float, float, float]


class _Heart(NamedTuple):
    """Radii in mm about `centre`, [S, SUBSLICES, _NUM_ANGLES]; `centre` [S, 2] in mm."""

    endo: np.ndarray
    epi: np.ndarray
    rv: np.ndarray
    rv_wall: np.ndarray
    fat: np.ndarray
    open_base: np.ndarray  # bool [S, _NUM_ANGLES], where the last slice's ring is not closed
    centre: np.ndarray
    septum: float


class _Disc(NamedTuple):
    """A tube with a wall; `drift` is its shift over the stack. All in mm.

    `metric` [2, 2] turns circles into ellipses of the same area.
    """

    centre: np.ndarray
    drift: np.ndarray
    radius: float
    wall: float
    fill: float
    rim: float
    metric: np.ndarray


def make_volume(index: int) -> PhantomVolume:
    """Draws synthetic volume number `index`, alone of its kind and the same at every call.

    Args:
      index: int >= 0. The volume depends on (SEED, index) only, not on other volumes.

    Returns:
      PhantomVolume with 5 to 10 slices from apex to base on the last axis. image is in raw units
      whose scale differs between volumes by orders of magnitude. label is 0 background, 1 RV,
      2 MYO, 3 LV (papillary muscles belong to LV, the thin RV free wall to the background). Every
      labelled pixel lies in the central 128 x 128 mm. An apical slice may be without RV or empty.

    Raises:
      ValueError: index is negative.
    """
    if index < 0:
        raise ValueError(f"index is {index}; wanted an integer >= 0")
    rng = np.random.default_rng([SEED, index])
    shape, spacing_mm = _draw_grid(rng)
    heights = np.linspace(_draw(rng, APEX_HEIGHT), _draw(rng, BASE_HEIGHT), shape[2])
    heart = _draw_heart(rng, heights)
    tissue = _draw_tissue(rng)
    image, label = _rasterise(rng, heart, tissue, shape, spacing_mm)
    image = _scan(rng, image, spacing_mm, contrast=1.0 - tissue["myo"])
    return PhantomVolume(image.astype(np.float32), label, spacing_mm)


def _draw(rng, bounds, size=None):
    return rng.uniform(*bounds, size=size)


def _draw_grid(rng):
    """Matrix (X, Y, S) and spacing (dx, dy, dz) in mm."""
    dx = dy = round(_draw(rng, PIXEL_MM), 4)
    stretch, is_anisotropic = _draw(rng, ANISOTROPY), rng.random() < ANISOTROPIC_FRACTION
    if is_anisotropic:
        dy = round(dx * stretch, 4)
        if dy > PIXEL_MM[1]:
            dx, dy = round(PIXEL_MM[1] / stretch, 4), PIXEL_MM[1]
        if rng.random() < 0.5:
            dx, dy = dy, dx
    field = _draw(rng, FIELD_MM, size=2)
    if rng.random() < SQUARE_FRACTION:
        field[1] = field[0]
    matrix = [int(np.clip(round(f / d), *MATRIX)) for f, d in zip(field, (dx, dy), strict=True)]
    num_slices = int(rng.choice(NUM_SLICES, p=NUM_SLICES_ODDS))
    return (*matrix, num_slices), (dx, dy, round(_draw(rng, SLICE_MM), 4))


def _angles():
    return (np.arange(_NUM_ANGLES) + 0.5) * (2 * np.pi / _NUM_ANGLES) - np.pi


def _bin(angle):
    """Index into the tables over _angles() for angles in radians."""
    return np.floor((angle + np.pi) * (_NUM_ANGLES / (2 * np.pi))).astype(np.int32) % _NUM_ANGLES


def _turn(angle):
    """The same angle in [-pi, pi]."""
    return np.angle(np.exp(1j * angle))


def _wave(rng, orders, amplitude):
    """A smooth random function of the angle with standard deviation `amplitude`."""
    theta = _angles()
    coefficients = rng.normal(size=(len(orders), 2))
    coefficients *= amplitude * np.sqrt(2) / np.linalg.norm(coefficients)
    return sum(
        a * np.cos(n * theta) + b * np.sin(n * theta)
        for n, (a, b) in zip(orders, coefficients, strict=True)
    )


def _draw_heart(rng, heights):
    """Boundaries for slices at `heights` [S], placed so that the labels fit HALF_FIELD_MM."""
    theta = _angles()
    step = heights[1] - heights[0]
    within = (np.arange(SUBSLICES) + 0.5) / SUBSLICES - 0.5
    z = np.minimum(heights[:, None] + SLICE_THICKNESS * step * within, 1.0)[..., None]

    # LV: two half ellipsoids, the outer one reaching further down, bent by harmonics in theta.
    radius, wall = _draw(rng, LV_RADIUS_MM), _draw(rng, WALL_MM)
    apex_wall = wall / (3.6 * radius)
    bend = _draw(rng, ELLIPTICITY) * np.cos(2 * (theta - _draw(rng, (0, np.pi))))
    bend = 1 + bend + _wave(rng, (3, 4, 5), 0.015)
    endo_profile = np.sqrt(np.maximum(1 - np.maximum(1 - z, 0) ** 2.2, 0))
    epi_profile = np.maximum(1 - np.maximum((1 - z) / (1 + apex_wall), 0) ** 2.2, 0)
    epi_profile = np.sqrt(epi_profile)
    endo = radius * endo_profile * bend
    thickness = wall * (1 + _wave(rng, (1, 2, 3), WALL_VARIATION))
    epi = (radius * bend + thickness) * epi_profile
    # Towards the apex the ellipsoids draw apart; keep the wall from growing past its size there.
    epi = np.where(endo > 0.35 * radius, np.minimum(epi, endo + 1.15 * thickness), epi)

    # RV: a band on the outside of the septum, deepest near its middle, pointed at both ends.
    septum = np.deg2rad(180.0 + _draw(rng, ROTATION_DEG))
    rv_apex = _draw(rng, RV_APEX_HEIGHT)
    growth = np.clip((z - rv_apex) / (0.8 - rv_apex), 0, 1) ** 0.6
    half_angle = np.deg2rad(_draw(rng, RV_HALF_ANGLE_DEG)) * (0.6 + 0.4 * growth)
    along = _turn(theta - septum) / half_angle
    depth = np.maximum(1 - np.abs(along) ** 2.5, 0) ** 0.75 * (1 + _draw(rng, RV_SKEW) * along)
    depth = _draw(rng, RV_DEPTH_MM) * growth * depth * (1 + _wave(rng, (3, 5, 7), 0.05))
    rv = epi + np.maximum(depth, 0)
    rv_wall = np.where(depth > 0.5, rv + _draw(rng, (2.2, 3.4)), rv)

    fat_mm = _draw(rng, FAT_MM)
    fat = np.maximum(fat_mm * (1 + _wave(rng, (1, 2, 3, 4), 0.9)), 0.8)
    fat = np.where(epi > 0, rv_wall + fat, 0)

    centre = np.linspace(-0.5, 0.5, len(heights))[:, None] * _draw(rng, TILT_MM, size=2)
    centre = centre + np.clip(rng.normal(size=centre.shape), -2, 2) * BREATHING_MM
    centre += _draw(rng, OFFSET_MM, size=2)
    scale, centre = _fit(rv, centre)

    open_base = np.zeros((len(heights), _NUM_ANGLES), bool)
    gap = np.abs(_turn(theta - septum - _draw(rng, (1.7, 2.4))))
    open_base[-1] = (gap < _draw(rng, (0.35, 0.6))) & (rng.random() < OPEN_BASE_FRACTION)
    endo, epi, rv, rv_wall, fat = (scale * r for r in (endo, epi, rv, rv_wall, fat))
    return _Heart(endo, epi, rv, rv_wall, fat, open_base, centre, septum)


def _fit(outline, centre):
    """Scale (<= 1) of the radii and moved `centre` such that outlines stay in HALF_FIELD_MM."""
    theta = _angles()
    directions = np.stack([np.cos(theta), np.sin(theta)], axis=-1)

    def extent(scale):
        points = centre[:, None, None] + scale * outline[..., None] * directions
        return points.min(axis=(0, 1, 2)), points.max(axis=(0, 1, 2))

    low, high = extent(1.0)
    scale = min(1.0, 2 * HALF_FIELD_MM / (high - low).max())
    low, high = extent(scale)
    # The tilt does not shrink with the scale, so a sliver may remain: split it evenly.
    shift = np.maximum(-HALF_FIELD_MM - low, 0) - np.maximum(high - HALF_FIELD_MM, 0)
    return scale, centre + shift


def _draw_tissue(rng):
    """Intensities relative to LV blood = 1."""
    myo = _draw(rng, MYO_LEVEL)
    return {
        "blood": 1.0,
        "myo": myo,
        "rv": 1.0 + (1.0 - myo) * _draw(rng, RV_CONTRAST),
        "liver": myo * _draw(rng, LIVER_TO_MYO),
        "muscle": myo * _draw(rng, MUSCLE_TO_MYO),
        "lung": min(_draw(rng, LUNG_LEVEL), 0.6 * myo),
        "fat": _draw(rng, FAT_LEVEL),
        "air": 0.01,
    }


def _draw_muscles(rng, heart):
    """Papillary muscles and trabeculae: (chamber, direction, relative depth, radius in mm)."""
    muscles = []
    for side in (-1, 1):
        direction = heart.septum + np.pi + side * _draw(rng, (0.6, 1.5))
        radius = _draw(rng, PAPILLARY_RADIUS_MM)
        muscles.append((LV, direction, _draw(rng, (0.55, 0.9)), radius))
    for _ in range(rng.integers(2, 6)):
        direction = heart.septum + _draw(rng, (-0.7, 0.7))
        muscles.append((RV, direction, _draw(rng, (0.45, 0.9)), _draw(rng, (1.2, 2.4))))
    return muscles


def _draw_chest(rng, heart):
    """The round chest whose wall passes in front of the RV: centre and three radii in mm."""
    outline, origin = heart.fat.max(axis=(0, 1)), heart.centre.mean(axis=0)
    front = heart.septum + _draw(rng, (-0.8, 0.8))
    radius = _draw(rng, (75, 120))
    reach = outline[_bin(front)] + _draw(rng, (0, 12))
    centre = origin + (reach - radius) * np.array([np.cos(front), np.sin(front)])
    muscle = _draw(rng, (5, 14))
    skin = muscle + _draw(rng, (4, 25))
    return centre, radius, radius + muscle, radius + skin, int(rng.integers(20, 34))


def _draw_discs(rng, heart, tissue):
    """Everything tubular around the heart, in the order in which it is painted."""
    outline, origin = heart.fat.max(axis=(0, 1)), heart.centre.mean(axis=0)

    def disc(centre, radius, fill, *, wall=0.0, rim=0.0, drift=DISC_DRIFT_MM):
        stretch, turn = _draw(rng, (1.0, DISC_STRETCH)), _draw(rng, (0, np.pi))
        axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        metric = np.diag([stretch, 1 / stretch]) @ axes
        return _Disc(centre, rng.normal(size=2) * drift, radius, wall, fill, rim, metric)

    def beside(radius, gap, angles):
        """Finds a disc's centre `gap` from the heart, at the one of `angles` nearest the middle."""
        centres = []
        for angle in angles:
            near = np.abs(_turn(_angles() - angle)) < 0.6
            away = outline[near].max() + gap + radius
            centres.append(origin + away * np.array([np.cos(angle), np.sin(angle)]))
        return min(centres, key=lambda c: np.abs(c).max())

    def anywhere():
        # Most of what lies far from the middle is cropped away, hence several tries.
        return _draw(rng, (-np.pi, np.pi), size=4)

    discs = []
    for _ in range(rng.integers(10, 30)):  # vessels of the lung
        fill = tissue["lung"] + _draw(rng, (0.1, 0.7))
        discs.append(disc(_draw(rng, (-90, 90), size=2), _draw(rng, (1, 3.5)), fill, drift=20.0))
    for _ in range(rng.integers(*NUM_LOBES, endpoint=True)):
        radius = _draw(rng, (12, 40))
        centre = beside(radius, _draw(rng, (-4, 10)), anywhere())
        discs.append(disc(centre, radius, _draw(rng, LOBE_LEVEL)))
    behind = heart.septum + np.pi + _draw(rng, (-0.7, 0.7))
    radius, level = _draw(rng, (25, 45)), tissue["muscle"] * _draw(rng, (0.8, 1.3))
    discs.append(disc(beside(radius, _draw(rng, (0, 10)), [behind]), radius, level))
    side = rng.choice((-1, 1))
    below = heart.septum + side * _draw(rng, (1.0, 1.9))
    radius = _draw(rng, (50, 90))
    liver = beside(radius, _draw(rng, (-4, 5)), [below])
    discs.append(disc(liver, radius, tissue["liver"]))
    for _ in range(rng.integers(4, 12)):  # vessels of the liver
        centre, fill = liver + rng.normal(size=2) * 0.45 * radius, _draw(rng, (0.6, 1.7))
        discs.append(disc(centre, _draw(rng, (1.5, 4)), fill * tissue["liver"], drift=15.0))
    if rng.random() < STOMACH_FRACTION:
        content = tissue["air"] if rng.random() < 0.5 else _draw(rng, (0.5, 1.3))
        radius, wall = _draw(rng, (10, 22)), _draw(rng, (2, 4))
        angles = [below + side * _draw(rng, (0.4, 1.0))]
        centre = beside(radius + wall, _draw(rng, (2, 12)), angles)
        discs.append(disc(centre, radius, content, wall=wall, rim=tissue["muscle"]))
    for _ in range(rng.integers(*NUM_VESSELS, endpoint=True)):
        radius, fill = _draw(rng, (4, 13)), _draw(rng, VESSEL_LEVEL)
        centre = beside(radius, _draw(rng, (1, 12)), anywhere())
        discs.append(disc(centre, radius, fill, wall=1.5, rim=tissue["muscle"]))
    for _ in range(rng.integers(*NUM_LOOKALIKES, endpoint=True)):
        radius, wall = _draw(rng, LOOKALIKE_RADIUS_MM), _draw(rng, LOOKALIKE_WALL_MM)
        fill, rim = _draw(rng, (0.9, 1.1)), tissue["myo"] * _draw(rng, (0.85, 1.15))
        centre = beside(radius + wall, _draw(rng, (2, 14)), anywhere())
        discs.append(disc(centre, radius, fill, wall=wall, rim=rim))
    return discs


def _rasterise(rng, heart, tissue, shape, spacing_mm):
    """Noise-free image [X, Y, S] with partial volume, and the majority label."""
    xs, ys = (
        (np.arange(n * SUPERSAMPLING) - (n * SUPERSAMPLING - 1) / 2) * d / SUPERSAMPLING
        for n, d in zip(shape[:2], spacing_mm[:2], strict=True)
    )
    muscles = _draw_muscles(rng, heart)
    chest = _paint_chest(xs, ys, _draw_chest(rng, heart), tissue)
    discs = _draw_discs(rng, heart, tissue)
    image, label = np.zeros(shape), np.empty(shape, np.uint8)
    for s in range(shape[2]):
        behind = chest.copy()
        for disc in discs:
            _paint_disc(behind, xs, ys, disc, s / (shape[2] - 1) - 0.5)
        x, y = xs[:, None] - heart.centre[s, 0], ys[None, :] - heart.centre[s, 1]
        distance = np.hypot(x, y)
        inside = distance < heart.fat[s].max()
        distance, angle = distance[inside], _bin(np.arctan2(y, x)[inside])
        votes = np.zeros((4, *shape[:2]))
        for sub in range(SUBSLICES):
            fine, owner = behind.copy(), np.zeros(behind.shape, np.uint8)
            fine[inside], owner[inside] = _paint_heart(
                heart, tissue, muscles, s, sub, distance, angle, behind[inside]
            )
            image[..., s] += _block_mean(fine) / SUBSLICES
            for k in range(4):
                votes[k] += _block_mean(owner == k)
        label[..., s] = votes.argmax(axis=0)
    return image, label


def _block_mean(fine):
    k = SUPERSAMPLING
    return sum(fine[i::k, j::k].astype(float) for i in range(k) for j in range(k)) / k**2


def _paint_chest(xs, ys, chest, tissue):
    (cx, cy), inner, outer, skin, num_ribs = chest
    x, y = xs[:, None] - cx, ys[None, :] - cy
    distance = np.hypot(x, y)
    rib = np.sin(num_ribs * np.arctan2(y, x)) > 0.5
    wall = np.where(rib, 0.6 * tissue["muscle"], tissue["muscle"])
    layers = [distance < inner, distance < inner + 2.0, distance < outer, distance < skin]
    return np.select(layers, [tissue["lung"], tissue["fat"], wall, tissue["fat"]], tissue["air"])


def _paint_disc(canvas, xs, ys, disc, height):
    x, y = disc.centre + height * disc.drift
    outer = disc.radius + disc.wall
    reach = DISC_STRETCH * outer
    rows = slice(*np.searchsorted(xs, (x - reach, x + reach)))
    columns = slice(*np.searchsorted(ys, (y - reach, y + reach)))
    dx, dy = xs[rows, None] - x, ys[None, columns] - y
    (a, b), (c, d) = disc.metric
    distance = np.hypot(a * dx + b * dy, c * dx + d * dy)
    window = canvas[rows, columns]
    window[distance < outer] = disc.rim
    window[distance < disc.radius] = disc.fill


def _paint_heart(heart, tissue, muscles, s, sub, distance, angle, value):
    """Intensity and class of points in polar coordinates; `value` is what lies behind them."""
    endo, epi, rv, rv_wall, fat = (
        distance < radius[s, sub][angle]
        for radius in (heart.endo, heart.epi, heart.rv, heart.rv_wall, heart.fat)
    )
    layers = [endo, epi, rv, rv_wall, fat]
    levels = [tissue[name] for name in ("blood", "myo", "rv", "myo", "fat")]
    value = np.select(layers, levels, value)
    owner = np.select(layers[:3], [LV, MYO, RV], BACKGROUND)
    if heart.open_base[s].any():
        # The outflow tract: a thin leaflet closes the cavity, the blood behind it is not the LV.
        gap = heart.open_base[s][angle] & epi & ~endo
        leaflet = distance < heart.endo[s, sub][angle] + LEAFLET_MM
        value[gap] = np.where(leaflet[gap], tissue["myo"], tissue["blood"])
        owner[gap] = BACKGROUND
    for chamber, direction, depth, radius in muscles:
        k = _bin(direction)
        near, far = (
            (0.0, heart.endo[s, sub, k])
            if chamber == LV
            else (heart.epi[s, sub, k], heart.rv[s, sub, k])
        )
        at, radius = near + depth * (far - near), min(radius, 0.25 * (far - near))
        cosine = np.cos(_angles() - direction)[angle]
        away2 = distance**2 + at**2 - 2 * distance * at * cosine
        value[(owner == chamber) & (away2 < radius**2)] = tissue["myo"]
    return value, owner


def _scan(rng, image, spacing_mm, *, contrast):
    """Texture, coil shading, ghost, blur, Rician noise and the raw scale."""
    pixel = np.array([*spacing_mm[:2], np.inf])
    texture = ndimage.gaussian_filter(rng.normal(size=image.shape), 3.0 / pixel)
    image = image * (1 + _draw(rng, TEXTURE) * texture / texture.std())
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in image.shape), indexing="ij", sparse=True)
    x, y, z = axes
    terms = (x, y, 0.5 * z, x * y, x**2 - y**2, x**2 + y**2)
    shading = sum(c * t for c, t in zip(rng.normal(size=len(terms)), terms, strict=True))
    shading = (shading - shading.mean()) / shading.std() * _draw(rng, BIAS)
    image = image * np.exp(shading + SLICE_GAIN * rng.normal(size=image.shape[2]))
    shift = int(rng.integers(image.shape[1] // 4, image.shape[1] // 2))
    image = image + _draw(rng, GHOST) * np.roll(image, shift, axis=1)
    image = ndimage.gaussian_filter(image, _draw(rng, BLUR_MM) / pixel)
    sigma = contrast / _draw(rng, CONTRAST_TO_NOISE)
    noise = sigma * rng.normal(size=(2, *image.shape))
    return 10 ** _draw(rng, LOG10_SCALE) * np.hypot(image + noise[0], noise[1])
