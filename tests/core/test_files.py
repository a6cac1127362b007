"""Writing whole or not at all: full disks, places that cannot be written to, errors of what is written."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffportrait3d.cameras.export import export_views
from diffportrait3d.cameras.labels import orbit_camera
from diffportrait3d.files import WriteError, append_line, write_atomically, write_folder, write_text, write_together
from diffportrait3d.networks import AutoencoderConfig, AutoencoderKL
from diffportrait3d.weights.files import load_network, save_network
from diffportrait3d.weights.safetensors_writer import write_tensors

NOISE = torch.rand(300, 300, 3, generator=torch.Generator().manual_seed(0))
PICTURE = Image.fromarray((NOISE * 255).byte().numpy())
WRITERS = {  # each has a way of its own to the disk, and words of its own for a full one
    "torch": lambda path: write_atomically(path, lambda file: torch.save({"a": NOISE}, file)),
    "safetensors": lambda path: write_tensors(path, {"a": NOISE}, {"key": "1"}),
    "npy": lambda path: write_atomically(path, lambda file: np.save(file, NOISE.numpy())),
    "npz": lambda path: write_atomically(path, lambda file: np.savez_compressed(file, a=NOISE.numpy())),
    "png": lambda path: write_atomically(path, lambda file: PICTURE.save(file, "PNG")),
    "jpg": lambda path: write_atomically(path, lambda file: PICTURE.save(file, "JPEG", quality=100)),
    "webp": lambda path: write_atomically(path, lambda file: PICTURE.save(file, "WEBP", lossless=True)),
    "text": lambda path: write_text(path, "x" * 100_000),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("size", [1, 8000, 20_000])  # within a buffer, within a file
def test_no_room_leaves_what_was_there(tmp_path, room, kind, size):
    path = tmp_path / f"file.{kind}"
    path.write_text("before")
    with room(size), pytest.raises(WriteError, match=f"file.{kind}' cannot be written.* make room"):
        WRITERS[kind](path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    WRITERS[kind](path)
    assert path.stat().st_size > 20_000 and list(tmp_path.iterdir()) == [path]


def test_lines_are_added_whole(tmp_path, room):
    path = tmp_path / "log.jsonl"
    append_line(path, "é" * 400)
    with room(1000), pytest.raises(WriteError, match="log.jsonl"):
        append_line(path, "b" * 400)
    append_line(path, "c")
    assert path.read_text(encoding="utf-8") == "é" * 400 + "\nc\n"


def test_files_that_belong_together(tmp_path, room):
    """The second one does not fit: the first one is not replaced either."""
    files = {tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": lambda file: file.write(b"x" * 9000)}
    (tmp_path / "a").write_text("old")
    with room(5000), pytest.raises(WriteError, match="/b'"):
        write_together(files)
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_network_in_parts_is_replaced_as_a_whole(tmp_path, room):
    def network(seed: int) -> AutoencoderKL:
        torch.manual_seed(seed)
        return AutoencoderKL(AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1))

    path, limit = tmp_path / "vae.safetensors", 2**20
    files = save_network(path, network(0), "autoencoder", max_shard_bytes=limit)
    sizes = [file.stat().st_size for file in files]
    assert len(files) > 2 and sizes[0] < max(sizes)
    before = {file: file.read_bytes() for file in files}
    with room(max(sizes) - 1000), pytest.raises(WriteError):
        save_network(path, network(1), "autoencoder", max_shard_bytes=limit)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    save_network(path, network(1), "autoencoder", max_shard_bytes=limit)
    loaded = load_network(path)[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network(1).state_dict().items())


def test_an_export_of_views(tmp_path, room):
    arguments = (tmp_path / "export", NOISE[None], orbit_camera(torch.zeros(1), torch.zeros(1)))
    with room(20_000), pytest.raises(WriteError, match="export' cannot be written"):
        export_views(*arguments)
    assert not list(tmp_path.iterdir())
    export_views(*arguments)
    assert (tmp_path / "export/images/view_000.png").is_file()


def test_other_reasons(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file/x' cannot be written: .* choose another place"):
        write_text(tmp_path / "file" / "x", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match="folder' cannot be written: Is a directory"):
        write_text(tmp_path / "folder", "text")
    (tmp_path / "folder/x").write_text("")
    with pytest.raises(WriteError, match="folder' cannot be written: Directory not empty"):
        write_folder(tmp_path / "folder", lambda folder: None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_written_may_fail_in_its_own_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):  # a source that is missing is no full disk
        write_atomically(tmp_path / "x", lambda file: file.write((tmp_path / "nowhere").read_bytes()))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "y", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not list(tmp_path.iterdir())


def test_safetensors_of_every_kind(tmp_path):
    """Aligned and read back by the library itself, whatever the order and the widths."""
    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.rand(3).half(),
        "number": torch.tensor(7),
        "double": torch.rand(2, 2).double(),
        "brain": torch.rand(5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "turned": torch.rand(3, 2).T,
    }
    write_tensors(tmp_path / "all.safetensors", tensors, {"about": "all"})
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"about": "all"} and set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())


def test_a_disk_that_is_full(on_small_disk):
    """The real thing: no room, one sentence, nothing left behind; room, and it works."""
    program = (
        "import sys, os, torch; from pathlib import Path; from diffportrait3d.files import *\n"
        "path = Path(os.environ['DISK']) / 'x.pt'\n"
        "try: write_atomically(path, lambda file: torch.save(torch.zeros(int(sys.argv[1])), file))\n"
        "except WriteError as error: print(error)\n"
        "print(sorted(p.name for p in path.parent.iterdir()), path.exists() and path.stat().st_size > 100_000)\n"
    )
    python = f'"{sys.executable}" -c "$PROGRAM"'
    done = on_small_disk(500, f"{python} 40000; {python} 400000", PROGRAM=program)
    first, second, third = done.stdout.splitlines()
    assert (first, third) == ("['x.pt'] True", first), done
    assert second.endswith("x.pt' cannot be written: the disk is full; make room, then run it again.")
    assert not done.stderr
