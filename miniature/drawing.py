"""How a scene of the miniature world is drawn: sky, sun or moon, ground, and a lit solid object.

Lengths are in sides of the picture, x from the left and y from the top. Nothing is sampled more
than once per pixel: the edges that matter are signed distances, from which coverage follows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from miniature.world import LOOKS, VALUES, Scene

PICTURE_SIZE = 64  # pixels, both ways
COLOR_RGB, SIZE_RADIUS, SIDE_X = (
    np.array(list(LOOKS[name].values()), np.float32) for name in ("color", "size", "side")
)
SKY_RGB, GROUND_RGB, LIGHT_RGB, _SKY_AT_THE_TOP, _HILLS, _HILL_WAVES = (
    np.array([looks[name] for looks in LOOKS["place"].values()], np.float32)
    for name in ("sky", "ground", "light", "top", "hills", "waves")
)
LOWEST_SKY_LIGHT = 0.28
"""No sun and no moon is drawn below this y, and no object above it."""

_BLOCK = 128  # pictures that are drawn at once, and share a source of chance
_PIXELS = (np.arange(PICTURE_SIZE, dtype=np.float32) + 0.5) / PICTURE_SIZE
_X, _Y = _PIXELS[None, None, :], _PIXELS[None, :, None]  # [1, 1, W], [1, H, 1]

_SEA, _NIGHT = (VALUES["place"].index(name) for name in ("sea", "night"))

# [n, H, W], one number per pixel of n pictures; H and W are 1 where all pixels have the same.
Plane = NDArray[np.floating]
Colors = NDArray[np.floating]  # [n, H, W, 3]
Uniform = Callable[[float, float], Plane]  # a random number per picture, between two


class Solid(NamedTuple):
    """Objects of one shape: what they cover, and which way their surface faces."""

    coverage: Plane
    """The covered share of each pixel, 0..1."""
    normal_x: Plane
    normal_y: Plane
    """The parts of the surface's unit normal along the picture."""


def shape_distance(
    shape: int, dx: NDArray[np.floating], dy: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Signed distance from a shape's edge, negative inside, all in radii of the shape."""
    match VALUES["shape"][shape]:
        case "ring":
            return abs(np.hypot(dx, dy) - 0.72) - 0.28
        case "square":
            return np.maximum(abs(dx), abs(dy)) - 0.88
        case "triangle":
            slope = 0.54
            sides = (abs(dx) - slope * (dy + 0.95)) / (1 + slope**2) ** 0.5
            return np.maximum(sides, dy - 0.9)
        case _:  # cross
            upright = np.maximum(abs(dx) - 0.36, abs(dy) - 1)
            return np.minimum(upright, np.maximum(abs(dx) - 1, abs(dy) - 0.36))


def shape_coverage(
    shape: int, x: NDArray[np.floating], y: NDArray[np.floating], radius: NDArray[np.floating]
) -> Plane:
    """How much of each pixel a shape covers, for n centres and radii: [n, H, W], 0..1."""
    x, y, radius = (np.asarray(each, np.float32)[:, None, None] for each in (x, y, radius))
    distance = shape_distance(shape, (_X - x) / radius, (_Y - y) / radius)
    return _covered(distance * radius)


def render(scenes: Sequence[Scene], seed: int) -> NDArray[np.uint8]:
    """Draws one picture per scene: uint8 [N, H, W, 3].

    Horizon, hills, waves, sun or moon, stars, the exact place, size and gloss of the object and
    the noise vary from picture to picture.
    """
    pictures = [
        _render_block(scenes[start : start + _BLOCK], np.random.default_rng([seed, start]))
        for start in range(0, len(scenes), _BLOCK)
    ]
    return (
        np.concatenate(pictures)
        if pictures
        else np.zeros((0, PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    )


def _render_block(scenes: Sequence[Scene], rng: np.random.Generator) -> NDArray[np.uint8]:
    n = len(scenes)
    place, color, shape, size, side = np.array([scene.codes for scene in scenes]).T

    def uniform(low: float, high: float) -> Plane:  # [n, 1, 1]
        return rng.uniform(low, high, n).astype(np.float32)[:, None, None]

    light_x, light_y = uniform(0.12, 0.88), uniform(0.09, 0.19)
    picture = _landscape(place, light_x, light_y, uniform, rng)

    radius = SIZE_RADIUS[size][:, None, None] + uniform(-0.006, 0.006)
    x = SIDE_X[side][:, None, None] + uniform(-0.016, 0.016)
    y = 0.57 + uniform(-0.03, 0.03)
    dx, dy = (_X - x) / radius, (_Y - y) / radius
    # Away from the light, on the ground at the object's foot.
    away = np.clip(x - light_x, -0.4, 0.4)
    shadow = np.exp(-(((dx - 0.9 * away) / 0.95) ** 2) - ((dy - 0.96) / 0.2) ** 2)
    picture *= 1 - 0.45 * shadow[..., None]

    solid = Solid(*(np.empty((n, PICTURE_SIZE, PICTURE_SIZE), np.float32) for _ in range(3)))
    for code in range(len(VALUES["shape"])):
        of_shape = shape == code
        for whole, part in zip(solid, _solid(code, dx[of_shape], dy[of_shape], radius[of_shape])):
            whole[of_shape] = part
    paint = _lit(COLOR_RGB[color], solid, light_x - x, light_y - y, uniform(0.97, 1.03))
    picture += solid.coverage[..., None] * (paint - picture)
    picture += rng.standard_normal(picture.shape, np.float32)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _landscape(
    place: NDArray[np.int64],
    light_x: Plane,
    light_y: Plane,
    uniform: Uniform,
    rng: np.random.Generator,
) -> Colors:
    """Sky with sun or moon, hills, and ground."""
    sky, earth = SKY_RGB[place][:, None, None, :], GROUND_RGB[place][:, None, None, :]
    night = (place == _NIGHT)[:, None, None]
    light = LIGHT_RGB[place][:, None, None, :]

    horizon = uniform(0.45, 0.57)
    phase, ripple_phase = uniform(0, 2 * np.pi), uniform(0, 2 * np.pi)
    waves = _HILL_WAVES[place][:, None, None] * uniform(0.8, 1.2)
    height = _HILLS[place][:, None, None]
    near = horizon + height * np.sin(2 * np.pi * waves * _X + phase)  # [n, 1, W]
    far = horizon - 0.02 - height * (1 + 0.9 * np.sin(2 * np.pi * 1.6 * waves * _X + 2.3 * phase))

    # The sky grows lighter towards the horizon, and around the light.
    down = np.clip(_Y / horizon, 0, 1)[..., None]
    top = _SKY_AT_THE_TOP[place][:, None, None, None]
    rows = sky * (top + (1.06 - top) * down) + 4 * down
    picture = np.repeat(rows, PICTURE_SIZE, axis=2)
    distance = np.hypot(_X - light_x, _Y - light_y)
    glow = 0.38 * np.exp(-((distance / 0.15) ** 2))
    picture += glow[..., None] * (light - picture)
    radius = 0.072
    disc = _covered(distance - radius)
    # The moon is what a second disc leaves of the first.
    bitten = np.hypot(_X - light_x - 0.032, _Y - light_y + 0.016) - 0.9 * radius
    disc *= np.where(night, _covered(-bitten), 1)
    picture += disc[..., None] * (light - picture)
    _add_stars(picture, night * (glow < 0.04), horizon, rng)

    # Hills behind, in the haze between sky and ground.
    behind = _covered(far - _Y) * (height > 0)
    haze = 0.45 * sky + 0.55 * earth
    picture += behind[..., None] * (haze - picture)

    depth = np.clip((_Y - near) / (1 - near), 0, 1)  # 0 at the horizon, 1 at the lower edge
    ground = earth * (1.10 - 0.30 * depth[..., None])
    ground += _ripples(place, depth, ripple_phase)[..., None]
    # On the water the light mirrors itself below where it stands, broken by waves.
    sparkle = np.exp(-(((_X - light_x) / (0.05 + 0.10 * depth)) ** 2)) * (1 - depth)
    sparkle *= 0.5 + 0.5 * np.sin(2 * np.pi * 13 * _Y + 9 * np.sin(25 * _X + phase))
    on_water = (place == _SEA)[:, None, None]
    ground += (0.30 * on_water * sparkle)[..., None] * (light - ground)
    below = _covered(near - _Y)
    picture += below[..., None] * (ground - picture)
    return picture


def _ripples(place: NDArray[np.int64], depth: Plane, phase: Plane) -> Plane:
    """Dunes, blades of grass, or waves: what is added to the ground, larger when nearer."""
    x, y = 2 * np.pi * _X, 2 * np.pi * depth**0.7
    by_place = np.stack(
        [
            8 * np.sin(5.5 * y + 0.5 * np.sin(x + phase) + phase),
            6 * np.sin(11 * x + phase + 2 * y) * np.sin(7 * y),
            11 * np.sin(7 * y + 0.25 * np.sin(2 * x + phase) * 2 * np.pi),
            3 * np.sin(4 * y + np.sin(x + phase)),
        ]
    )
    return by_place[place, np.arange(len(place))] * (0.35 + 0.65 * depth)


def _add_stars(picture: Colors, dark: Plane, horizon: Plane, rng: np.random.Generator) -> None:
    """Brightens single pixels above the horizon where it is dark."""
    n = len(picture)
    where = rng.uniform(size=(n, 14, 2)).astype(np.float32)
    column = (where[..., 0] * PICTURE_SIZE).astype(int)
    row = (where[..., 1] * (horizon[:, :, 0] - 0.12) * PICTURE_SIZE).astype(int)
    pixels = np.arange(n)[:, None], row, column
    brightness = rng.uniform(70, 190, (n, 14)).astype(np.float32) * dark[pixels]
    np.add.at(picture, pixels, brightness[..., None])


def _solid(shape: int, dx: Plane, dy: Plane, radius: Plane) -> Solid:
    """A shape with rounded edges: the ring is a torus, the others are bevelled."""
    distance, h = shape_distance(shape, dx, dy), 0.02
    # The distance grows fastest straight away from the edge: its slope is where an edge faces.
    across = shape_distance(shape, dx + h, dy) - shape_distance(shape, dx - h, dy)
    down = shape_distance(shape, dx, dy + h) - shape_distance(shape, dx, dy - h)
    bevel = 0.28 if VALUES["shape"][shape] == "ring" else 0.2
    tilt = 1 - np.clip(-distance / bevel, 0, 1)  # 1 at the edge, 0 where the surface is flat
    return Solid(_covered(distance * radius), tilt * (across / (2 * h)), tilt * (down / (2 * h)))


def _covered(distance: Plane) -> Plane:
    """The share of a pixel that is inside, by the distance of its centre from the edge."""
    return np.clip(0.5 - distance * PICTURE_SIZE, 0, 1)


def _lit(
    color: NDArray[np.floating], solid: Solid, light_x: Plane, light_y: Plane, gloss: Plane
) -> Colors:
    """The paint of objects of colours [n, 3] under a light that is (light_x, light_y) away."""
    above = 0.45  # how far the light is before the picture
    length = np.sqrt(light_x**2 + light_y**2 + above**2)
    light_x, light_y, light_z = light_x / length, light_y / length, above / length
    normal_z = np.sqrt(np.clip(1 - solid.normal_x**2 - solid.normal_y**2, 0, 1))
    facing = solid.normal_x * light_x + solid.normal_y * light_y + normal_z * light_z
    # Flat parts keep the colour as it is.
    brightness = gloss * np.clip(1 + 0.38 * (facing - light_z), 0.6, 1.3)
    # A surface that faces half way between the light and the eye mirrors the light (Blinn, 1977).
    mirrored = (facing + normal_z) / np.sqrt(2 + 2 * light_z)
    shine = 60 * np.clip(mirrored, 0, 1) ** 24
    return color[:, None, None] * brightness[..., None] + shine[..., None]
