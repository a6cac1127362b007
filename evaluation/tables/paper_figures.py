"""What the paper's Tables 1 to 3 report for novel portrait synthesis, typed from the paper (Gu et al., CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("lpips", "ssim", "dists", "id", "fid", "pose")


@dataclass(frozen=True)
class Row:
    """A line of one of the paper's tables, in the setting that it was measured in.

    task: "reconstruction" or "novel". size: pixels. background: "with" or "without". reference: "aligned" or
    "unaligned". numbers: by NAMES; what the paper leaves out is absent. The paper does not say which LPIPS net it is,
    how many images FID counts, nor whether POSE is a mean square or a norm (radians).
    """

    table: str
    method: str
    data: str
    task: str
    size: int
    background: str
    reference: str
    numbers: dict[str, float]


def _rows(table: str, method: str, size: int, background: str, **columns: tuple) -> list[Row]:
    """Three settings per method, as in Tables 1a and 3: reconstruction, novel views, reconstruction in the wild."""
    settings = (("NeRSemble", "reconstruction"), ("NeRSemble", "novel"), ("in the wild", "reconstruction"))
    rows = []
    for k, (data, task) in enumerate(settings):
        numbers = {name: values[k] for name, values in columns.items() if values[k] is not None}
        rows.append(Row(table, method, data, task, size, background, "aligned", numbers))
    return rows


def _ablation(table: str, method: str, reference: str, *numbers: float) -> Row:
    values = dict(zip(NAMES, numbers, strict=False))
    return Row(table, method, "NeRSemble", "novel", 512, "with", reference, values)


ROWS = [
    *_rows(
        "1a", "DiffPortrait3D", 256, "with", pose=(None, 0.0068, None), lpips=(0.02, 0.23, 0.02),
        ssim=(0.92, 0.62, 0.93), dists=(0.06, 0.21, 0.04), id=(0.95, 0.70, 0.92), fid=(7.65, 27.4, 11.7),
    ),
    *_rows(
        "1a", "EG3D-PTI", 256, "with", pose=(None, 0.0021, None), lpips=(0.21, 0.26, 0.36),
        ssim=(0.66, 0.59, 0.46), dists=(0.21, 0.24, 0.27), id=(0.15, 0.28, 0.12), fid=(33.13, 56.2, 95.0),
    ),
    *_rows(
        "1a", "GOAE", 256, "with", pose=(None, 0.0022, None), lpips=(0.12, 0.28, 0.21),
        ssim=(0.72, 0.57, 0.54), dists=(0.15, 0.25, 0.20), id=(0.55, 0.39, 0.54), fid=(54.10, 84.8, 92.0),
    ),
    *_rows(
        "1a", "TriPlaneNet", 256, "with", pose=(None, 0.0134, None), lpips=(0.10, 0.39, 0.17),
        ssim=(0.76, 0.50, 0.63), dists=(0.15, 0.29, 0.19), id=(0.70, 0.45, 0.70), fid=(63.54, 112.1, 88.0),
    ),
    _ablation("1b", "without fine-tuning F_ref", "aligned", 0.55, 0.47, 0.43, 0.21, 99.09),
    _ablation("1b", "reference unaligned", "unaligned", 0.28, 0.68, 0.19, 0.70, 25.77),
    _ablation("1b", "reference aligned", "aligned", 0.27, 0.68, 0.18, 0.70, 25.37),
    _ablation("2", "3D-aware noise", "aligned", 0.27, 0.68, 0.18, 0.70, 25.37),
    _ablation("2", "random noise", "aligned", 0.32, 0.65, 0.21, 0.70, 26.81),
    *_rows(
        "3", "DiffPortrait3D", 512, "without", lpips=(0.04, 0.19, 0.04), ssim=(0.90, 0.74, 0.88),
        dists=(0.05, 0.15, 0.04), id=(0.94, 0.70, 0.92), fid=(6.5, 32.6, 11.6),
    ),
    *_rows(
        "3", "Zero-1-to-3", 512, "without", lpips=(0.28, None, 0.34), ssim=(0.70, None, 0.52),
        dists=(0.16, None, 0.19), id=(0.82, 0.09, 0.70), fid=(61.4, 113.8, 57.5),
    ),
]  # fmt: skip


def rows_for(task: str, size: int, background: str, reference: str) -> list[Row]:
    """The paper's rows for a setting; Table 1b, which compares references, is shown with both."""
    setting = (task, size, background)
    rows = [row for row in ROWS if (row.task, row.size, row.background) == setting]
    return [row for row in rows if row.reference == reference or row.table == "1b"]
