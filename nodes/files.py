"""Cameras and images of the user's own, from files and to files."""

from __future__ import annotations

from comfy_api.latest import io

from ..diffportrait3d.cameras.files import read_labels, write_labels
from ..host import user_files
from .input_checks import Node
from .sockets import ADVANCED, FILES, Cameras, whole

EG3D, PLAIN, NPY = "json, EG3D's dataset.json", "json, plain list", "npy"
WHERE = "Searched below the host's input folder and, marked [output], its output folder; press R after adding files."
TOKENS = "%width%, %date:yyyy-MM-dd%, %node.widget% and the others are replaced as in Save Image."


class LoadCameras(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_LoadCameras",
            display_name="Load Cameras",
            category=FILES,
            description="Reads cameras from a file: EG3D's labels, 25 numbers per view (camera-to-world matrix and "
            "intrinsics), nerfstudio's transforms.json, or COLMAP's text files. Views with names come in natural order "
            "of the names, like the images of Load Camera Conditions.",
            search_aliases=[
                "EG3D labels",
                "dataset.json",
                "transforms.json",
                "nerfstudio cameras",
                "COLMAP cameras",
                "camera file",
                "import cameras",
            ],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=user_files.CAMERA_FILES.names(),
                    tooltip="EG3D's dataset.json, a plain JSON list of 25-number lists, a .npy array, nerfstudio's "
                    "transforms.json, a folder with COLMAP's cameras.txt and images.txt, or one with one .json, .npy "
                    "or .txt file per view. " + WHERE,
                )
            ],
            outputs=[
                Cameras.Output(display_name="cameras", tooltip="The cameras, one per label."),
                io.Int.Output(display_name="views", tooltip="How many cameras."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return user_files.CAMERA_FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None) -> str:
        return user_files.CAMERA_FILES.fingerprint(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        labels = read_labels(user_files.listed_path(file))
        return io.NodeOutput({"labels": labels}, len(labels))


class SaveCameras(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_SaveCameras",
            display_name="Save Cameras",
            category=FILES,
            description="Writes cameras below the output folder as EG3D's labels, 25 numbers per view. Load Cameras "
            "and EG3D's own tools read them.",
            search_aliases=["EG3D labels", "dataset.json", "export cameras"],
            is_output_node=True,
            inputs=[
                Cameras.Input("cameras", tooltip="The cameras to write."),
                io.String.Input(
                    "filename_prefix",
                    default="cameras/views",
                    tooltip="Folder and beginning of the name, below the output folder; a number is appended. "
                    + TOKENS,
                ),
                io.Combo.Input(
                    "format",
                    options=[EG3D, PLAIN, NPY],
                    tooltip="EG3D's dataset.json names each view 00000.png, 00001.png and so on; the plain list has "
                    "only the numbers; npy is a float32 array with one row per view.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="The views of these cameras. Only their size is read: %width% and %height% in the name "
                    "stand for it.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="Where the file is.")],
        )

    @classmethod
    def execute(cls, cameras, filename_prefix, format, images=None) -> io.NodeOutput:
        path = user_files.new_output(filename_prefix, images, "_.npy" if format == NPY else "_.json")
        labels = cameras["labels"]
        write_labels(path, labels, [f"{view:05d}.png" for view in range(len(labels))] if format == EG3D else None)
        return io.NodeOutput(str(path))


class LoadCameraConditions(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_LoadCameraConditions",
            display_name="Load Camera Conditions",
            category=FILES,
            description="A folder of images as one batch in natural order of their names: renders of somebody else "
            "from the wanted cameras, as the authors ship them, for View ControlNet.",
            search_aliases=["load image folder", "EG3D renders", "pose images", "load proxies", "image sequence"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=user_files.IMAGE_FOLDERS.names(),
                    tooltip="Folder with one image per view. Proxy views for 3D-Aware Noise are loaded the same way. "
                    + WHERE,
                ),
                whole(
                    "width",
                    (512, 64, 2048),
                    "Width of the views. Images of another size are cropped around their centre to the views' aspect, "
                    "then resized.",
                    step=8,
                ),
                whole("height", (512, 64, 2048), "Height of the views.", step=8),
            ],
            outputs=[
                io.Image.Output(tooltip="One image per view: for View ControlNet, or proxies for 3D-Aware Noise."),
                io.Int.Output(display_name="views", tooltip="How many images."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        return user_files.IMAGE_FOLDERS.check(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str | None, **kwargs) -> str:
        return user_files.IMAGE_FOLDERS.fingerprint(folder)

    @classmethod
    def execute(cls, folder, width, height) -> io.NodeOutput:
        images = user_files.load_images(user_files.listed_path(folder), width, height)
        return io.NodeOutput(images, len(images))


class ExportViews(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DP3D_ExportViews",
            display_name="Export Views",
            category=FILES,
            description="Writes the views and their cameras for 3D reconstruction: one folder with the images, "
            "nerfstudio's transforms.json and COLMAP's text files, on which nerfstudio, gsplat and others train.",
            search_aliases=["gaussian splatting", "3DGS", "gsplat", "nerfstudio", "COLMAP", "transforms.json", "NeRF"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The views; an alpha channel is kept in the images."),
                Cameras.Input("cameras", tooltip="The cameras of the views, in the same order."),
                io.String.Input(
                    "filename_prefix",
                    default="views/head",
                    tooltip="Beginning of the folder's name, below the output folder; a number is appended. " + TOKENS,
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per view, white where the image counts (the head). Saved beside the images.",
                ),
                whole(
                    "start_points",
                    (5000, 0, 30000),
                    "Points on an invented head, coloured from the views, from which a splat training may "
                    "start. 0: none, for trainers that begin with random ones: nerfstudio as it is, gsplat with "
                    "--init-type random --no-normalize-world-space (its default normalises by the points).",
                    **ADVANCED,
                ),
            ],
            outputs=[io.String.Output(display_name="folder", tooltip="Where the files are.")],
        )

    @classmethod
    def execute(cls, images, cameras, filename_prefix, start_points=5000, masks=None) -> io.NodeOutput:
        folder = user_files.new_output(filename_prefix, images)
        user_files.export_dataset(folder, images, cameras["labels"], masks, start_points)
        return io.NodeOutput(str(folder))


NODES = [LoadCameras, SaveCameras, LoadCameraConditions, ExportViews]
