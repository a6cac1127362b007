"""What a person looks like besides the shape: skin, lips, brows, eyes, beard, clothes, light and background.

`Look` draws it from a generator; `paint_head` turns it into vertex colours, anchored to the rest
shape's landmarks so that it works for every head provider. Colours are sRGB in [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .mesh import SKIN, SOCKET, TABLES, TEETH, HeadMesh, Noise, Surface, gauss, grid_triangles, smooth
from .scene import Background, Light

SKIN_TONES, NATURAL_HAIR, DYED_HAIR, IRISES, CLOTH = (
    torch.tensor(TABLES[name]) for name in ("skin tones", "natural hair", "dyed hair", "irises", "cloth")
)
HAIR_STYLES: dict[str, list[float]] = TABLES["hair styles"]  # thickness in cm, weights with a beard and without
BEARDS = ("none", "stubble", "moustache", "goatee", "full")


class Dice:
    """Random draws from one explicit generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand(1, generator=self.generator))

    def normal(self, spread: float = 1.0) -> float:
        return spread * float(torch.randn(1, generator=self.generator).clamp(-2, 2))

    def colour_jitter(self, spread: float) -> Tensor:
        """A common brightness change and a smaller one per channel."""
        common, own = (torch.randn(n, generator=self.generator).clamp(-2, 2) * spread for n in (1, 3))
        return 1 + common + own * 0.3

    def choice(self, options, weights=None):
        weights = torch.ones(len(options)) if weights is None else torch.tensor(weights)
        return options[int(torch.multinomial(weights, 1, generator=self.generator))]


class Look:
    """An appearance, drawn; styles, beards and make-up are drawn together so that they suit each other.

    Colours are sRGB [3], the rest is what the names say (lengths in cm, strengths 0..1).
    """

    def __init__(self, generator: torch.Generator):
        dice = Dice(generator)
        tone = dice.uniform(0, len(SKIN_TONES) - 1.001)
        low = int(tone)
        skin = torch.lerp(SKIN_TONES[low], SKIN_TONES[low + 1], tone - low) * dice.colour_jitter(0.03)
        self.skin = skin.clamp(0.08, 0.97)
        self.hair, self.brow = _hair_colour(dice, tone)
        bearded = dice.uniform() < 0.5
        weights = [style[1 if bearded else 2] for style in HAIR_STYLES.values()]
        self.hair_style: str = dice.choice(list(HAIR_STYLES), weights)
        self.beard: str = dice.choice(BEARDS, [3.0, 2.6, 0.8, 1.0, 2.2]) if bearded else "none"
        self.makeup = 0.0 if bearded else dice.uniform(0, 0.9)
        rosy = torch.tensor([0.86, 0.60, 0.58])
        if self.makeup >= 0.4:
            rosy = dice.choice(list(torch.tensor([[0.80, 0.36, 0.38], [0.70, 0.25, 0.32], [0.85, 0.50, 0.48]])))
        self.lip = self.skin * torch.lerp(torch.tensor([0.90, 0.70, 0.68]), rosy, 0.5 + 0.5 * self.makeup)
        self.gaze = normalize(torch.tensor([dice.normal(0.08), dice.normal(0.05), 1.0]), dim=0)
        self.iris = dice.choice(list(IRISES), _iris_weights(tone)) * dice.colour_jitter(0.1)
        self.hair_thickness = HAIR_STYLES[self.hair_style][0] * dice.uniform(0.75, 1.3)
        self.hair_length = dice.uniform()
        self.hairline = dice.normal(3.0)
        self.fringe = dice.uniform(0.6, 1.0) if dice.uniform() < 0.3 else 0.0
        self.parting = dice.uniform(-4.5, 4.5)
        self.covers_ears = dice.uniform() < 0.6
        self.beard_strength = dice.uniform(0.6, 1.0)
        self.brow_width = dice.uniform(0.75, 1.3) * (1.15 if bearded else 0.85)
        self.freckles = max(0.0, dice.uniform(-1.5, 1.0)) * (tone < 4)
        self.blush = dice.uniform(0.2, 1.0)
        self.age = max(0.0, dice.uniform(-0.8, 1.0))
        self.cloth = dice.choice(list(CLOTH)) * dice.colour_jitter(0.08)
        self.cloth_second = dice.choice(list(CLOTH))
        self.pattern: str = dice.choice(("plain", "stripes", "zip", "knit"), [4.0, 1.5, 1.0, 1.5])
        self.collar = dice.uniform()
        self.light = _sample_light(dice)
        self.background = _sample_background(dice)


def paint_head(mesh: HeadMesh, look: Look, generator: torch.Generator) -> Surface:
    """Vertex colours of the head itself: skin, lips, brows, lashes, beard, teeth, mouth."""
    p, marks = mesh.rest, mesh.landmarks
    front = smooth(p[:, 2], 3.0, 6.0)
    albedo = look.skin * (1 + 0.035 * Noise(generator, 0.5)(p)[:, None] * torch.tensor([0.6, 1.0, 1.1]))
    albedo = albedo * (1 + _blush(p, marks, front)[:, None] * torch.tensor([0.03, -0.085, -0.07]) * (0.3 + look.blush))
    spots = smooth(Noise(generator, 4.0)(p), 0.5, 0.8) * gauss((p - marks[29]).norm(dim=1), 4.0) * look.freckles
    albedo = albedo * (1 - 0.3 * spots[:, None] * torch.tensor([0.6, 1.0, 1.2]))
    albedo = albedo * (1 - _eye_rings(p, mesh)[:, None] * torch.tensor([0.10, 0.17, 0.15]) * (0.5 + look.age))
    lips = _lips(p, marks)
    albedo = _mix(albedo, look.lip, lips)
    specular = 0.10 + 0.15 * lips
    beard = _beard(p, marks, look, Noise(generator, 3.0)) * (1 - lips)
    albedo = _mix(albedo, look.brow * (1 + 0.15 * Noise(generator, 5.0)(p))[:, None], beard)
    brows = _brows(p, marks, look.brow_width) * (0.8 + 0.2 * Noise(generator, 6.0)(p)).clamp(0, 1)
    albedo = _mix(albedo, look.brow, brows)
    albedo = _mix(albedo, torch.tensor([0.06, 0.045, 0.04]), _lashes(p, marks) * (0.6 + 0.4 * look.makeup))
    skin = mesh.part == SKIN
    for part, colour, shine in ((TEETH, [0.90, 0.87, 0.80], 0.6), (SOCKET, [0.36, 0.14, 0.13], 0.1)):
        albedo[mesh.part == part] = torch.tensor(colour)
        specular[mesh.part == part] = shine
    specular = specular * (1 - 0.6 * beard * skin)
    return Surface(mesh.vertices, mesh.triangles, albedo.clamp(0, 1), specular)


def eyeballs(mesh: HeadMesh, look: Look) -> Surface:
    """Both eyeballs as front caps with a cornea, iris, pupil and limbus; they look along `look.gaze`."""
    rows, columns = 30, 32
    angle = torch.cat([torch.linspace(0, 0.62, 20), torch.linspace(0.62, 1.75, rows - 19)[1:]])
    phi = torch.arange(columns) * (2 * math.pi / columns)
    a, f = (grid.flatten() for grid in torch.meshgrid(angle, phi, indexing="ij"))
    cap = torch.stack([torch.sin(a) * torch.cos(f), torch.sin(a) * torch.sin(f), torch.cos(a)], 1)  # axis +z
    cap = cap * (mesh.eye_radius * (1 + 0.05 * smooth(0.5 - a, 0.0, 0.4)))[:, None]
    side = normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), look.gaze), dim=0)
    turn = torch.stack([side, torch.linalg.cross(look.gaze, side), look.gaze], 1)
    rays = 1 + 0.18 * torch.sin(f * 13) * torch.sin(f * 7 + 1)
    iris = look.iris * rays[:, None] * (1.25 - 0.7 * smooth(a, 0.30, 0.40))[:, None]
    white = torch.tensor([0.86, 0.84, 0.82]) * (1 - 0.12 * smooth(a, 0.7, 1.2))[:, None]
    albedo = _mix(white, iris, 1 - smooth(a, 0.385, 0.425))
    albedo = _mix(albedo, torch.tensor([0.02, 0.02, 0.02]), 1 - smooth(a, 0.15, 0.18))
    lid = smooth((cap @ turn.T)[:, 1] / mesh.eye_radius, 0.12, 0.42)
    albedo = albedo * (1 - 0.4 * lid)[:, None]  # its shade
    vertices = torch.cat([cap @ turn.T + centre for centre in mesh.eyes])
    triangles = grid_triangles(rows, columns)
    return Surface(
        vertices, torch.cat([triangles, triangles + len(cap)]), albedo.repeat(2, 1), torch.full((2 * len(cap),), 0.9)
    )


def _hair_colour(dice: Dice, tone: float) -> tuple[Tensor, Tensor]:
    """Colour of the hair and of brows and beard; dark skin mostly has dark hair, dyed hair keeps natural brows."""
    fair = max(0.04, 1 - tone / 5)
    weights = [1.2, 1.5, 2.0, 2.2 * fair, 2.2 * fair, 2.2 * fair, 2.2 * fair, 1.1 * fair, 1.0 * fair, 0.6, 0.5]
    natural = dice.choice(list(NATURAL_HAIR), weights) * dice.colour_jitter(0.1)
    dyed = dice.uniform() < 0.08
    hair = dice.choice(list(DYED_HAIR)) * dice.colour_jitter(0.1) if dyed else natural
    return hair.clamp(0.03, 0.9), (natural * 0.72).clamp(0.03, 0.6)


def _iris_weights(tone: float) -> list[float]:
    light = max(0.05, 1 - tone / 4)
    return [2.0, 2.0, 1.6 * light, 1.0 * light, 1.0 * light, 1.0]


def _sample_light(dice: Dice) -> Light:
    yaw, pitch = math.radians(dice.uniform(-65, 65)), math.radians(dice.uniform(12, 55))
    direction = torch.tensor([math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)])
    warm = dice.normal(0.06)
    key = torch.tensor([1 + warm, 1.0, 1 - warm]) * dice.uniform(0.55, 0.95)
    sky = torch.tensor([1 - 0.6 * warm, 1.0, 1 + 0.8 * warm]) * dice.uniform(0.50, 0.72)
    return Light(direction, key, sky, sky * torch.tensor([0.62, 0.56, 0.50]))


def _sample_background(dice: Dice) -> Background:
    grey = torch.tensor([dice.uniform(0.2, 0.95)] * 3)
    hue = torch.rand(3, generator=dice.generator)
    first = torch.lerp(grey, hue, dice.uniform(0.05, 0.40))
    other = torch.lerp(first, torch.rand(3, generator=dice.generator), dice.uniform(0.12, 0.5))
    noise = Noise(dice.generator, dice.choice((2.0, 4.0, 7.0)), octaves=2)
    return Background(torch.stack([first, other, first * dice.uniform(0.5, 1.0)]), noise, dice.choice((0.6, 1.5, 4.0)))


def polyline_distance(points: Tensor, line: Tensor) -> Tensor:
    """Distance [N] of points [N, 3] to a polyline [M, 3]."""
    start, along = line[:-1], line[1:] - line[:-1]  # [M-1, 3]
    offset = points[:, None] - start  # [N, M-1, 3]
    t = ((offset * along).sum(-1) / (along * along).sum(-1)).clamp(0, 1)
    return (offset - t[..., None] * along).norm(dim=-1).amin(1)


def _mix(base: Tensor, colour: Tensor, amount: Tensor) -> Tensor:
    amount = amount.clamp(0, 1)[:, None]
    return base * (1 - amount) + colour * amount


def _blush(p: Tensor, marks: Tensor, front: Tensor) -> Tensor:
    cheeks = [marks[31] + p.new_tensor([-2.6, 0.8, -1.0]), marks[35] + p.new_tensor([2.6, 0.8, -1.0])]
    spots = sum((gauss((p - cheek).norm(dim=1), 1.7) for cheek in cheeks), p.new_zeros(()))
    nose, chin = gauss((p - marks[30]).norm(dim=1), 1.1), gauss((p - marks[8]).norm(dim=1), 1.5)
    return (spots + 0.8 * nose + 0.4 * chin) * front


def _eye_rings(p: Tensor, mesh: HeadMesh) -> Tensor:
    reach = [(p - eye - p.new_tensor([0.0, -0.5, 1.2])) * p.new_tensor([0.75, 1.15, 1.0]) for eye in mesh.eyes]
    return sum((gauss(offset.norm(dim=1), 1.05) for offset in reach), p.new_zeros(())).clamp(max=1)


def _lips(p: Tensor, marks: Tensor) -> Tensor:
    """Upper and lower vermilion: close to the ring between the outer and the inner lip contour."""
    outer, inner = marks[[*range(48, 60), 48]], marks[[*range(60, 68), 60]]
    middle = marks[[48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 48]] * 0.5
    pairs = marks[[60, 61, 61, 62, 63, 63, 64, 65, 65, 66, 67, 67, 60]] * 0.5
    ring = torch.stack([polyline_distance(p, line) for line in (inner, middle + pairs)]).amin(0)
    return smooth(0.62 - ring, 0.0, 0.26) * smooth(polyline_distance(p, outer) + 0.62 - ring, 0.0, 0.5)


def _brows(p: Tensor, marks: Tensor, width: float) -> Tensor:
    distance = torch.minimum(polyline_distance(p, marks[17:22]), polyline_distance(p, marks[22:27]))
    taper = 1 - 0.35 * smooth(p[:, 0].abs(), 3.0, 5.8)
    return smooth(0.42 * width * taper - distance, -0.16, 0.16) * 0.9


def _lashes(p: Tensor, marks: Tensor) -> Tensor:
    upper = torch.minimum(polyline_distance(p, marks[36:40]), polyline_distance(p, marks[42:46]))
    lower = torch.minimum(polyline_distance(p, marks[[36, 41, 40, 39]]), polyline_distance(p, marks[[42, 47, 46, 45]]))
    return torch.maximum(gauss(upper, 0.13), 0.35 * gauss(lower, 0.10))


def _beard(p: Tensor, marks: Tensor, look: Look, noise: Noise) -> Tensor:
    """Coverage 0..1: jaw and chin below a line from mouth corner to sideburn, upper lip, or parts of them."""
    if look.beard == "none":
        return torch.zeros(len(p))
    x, y, z = p.unbind(1)
    mouth, nose, chin = marks[[48, 54]].mean(0), marks[33], marks[8]
    side = smooth(x.abs(), 1.5, 7.0)
    line = mouth[1] + 0.4 + side * 4.2  # upper border rises towards the sideburns
    jaw = smooth(line - y, -0.3, 0.9) * smooth(y - (chin[1] - 1.8 + 1.5 * side), -0.8, 0.8)
    jaw = jaw * smooth(z, marks[0, 2] - 3.2, marks[0, 2] - 1.2)
    lip = smooth(nose[1] - 0.35 - y, -0.1, 0.4) * smooth(y - mouth[1], -0.6, 0.2)
    lip = lip * smooth(3.4 - x.abs(), 0, 0.8) * smooth(z, 8, 9)
    ring = smooth(3.2 - x.abs() - 0.15 * (mouth[1] - y), 0, 0.8)
    both, chin_and_lip = torch.maximum(jaw, lip), torch.maximum(jaw * ring, lip)
    cover = {"stubble": both, "full": both, "moustache": lip, "goatee": chin_and_lip}[look.beard]
    strength = 0.38 if look.beard == "stubble" else look.beard_strength
    return (cover * strength * (0.92 + 0.10 * noise(p))).clamp(0, 1)
