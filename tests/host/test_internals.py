"""The list of the host's internals: complete, true in this host, and clear where a host lacks one."""

from __future__ import annotations

import ast

import pytest

from tools.host import PACK

HOST_PACKAGES = (
    "comfy",
    "comfy_execution",
    "latent_preview",
    "server",
)  # comfy_api and folder_paths are its public ones


def names_in(path) -> set[tuple[str, str]]:
    """(module, name) of what a file of ours imports, or reads as an attribute, from the host's modules."""
    tree, modules, found = ast.parse(path.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            found.add((modules[ast.unparse(node.value)], node.attr))
    return {(module, name) for module, name in found if module.split(".")[0] in HOST_PACKAGES}


def test_every_name_of_ours_is_in_the_list(pack):
    listed = {(row.module, row.name.split(".")[0]) for row in pack.host.internals.internals()}
    listed |= {("server", "PromptServer")}
    used = set().union(
        *(names_in(path) for room in ("host", "nodes", "patches") for path in (PACK / room).glob("*.py"))
    )
    assert used and used <= listed, used - listed


def test_rows_are_about_files_of_ours(pack):
    for row in pack.host.internals.internals():
        assert (PACK / row.used_in).is_dir() or (PACK / f"{row.used_in}.py").is_file(), row
        assert row.required in ("yes", "no") and row.since and row.instead, row


def test_this_host_has_them_all(pack, caplog):
    pack.host.internals.check_internals()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_host_without_one_is_named(host, pack, monkeypatch, caplog):
    """Attributes, arguments and texts; what the pack can do without is a warning."""
    internals = pack.host.internals
    rows = {row.name: row for row in internals.internals()}
    text, mark = rows['"uuids"']._replace(name='"no such key"'), rows["class HyperTile"]._replace(name="class Other")
    with monkeypatch.context() as changed:
        changed.delattr(host.comfy.context_windows, "ContextSchedule")
        changed.setattr(host.comfy.sd, "VAE", lambda sd: None)
        changed.setattr(internals, "internals", lambda: [*rows.values(), text, mark])
        with pytest.raises(ImportError) as caught:
            internals.check_internals()
    said = str(caught.value)
    assert "comfy.context_windows has no ContextSchedule (for patches/view_windows; instead:" in said
    assert "VAE of comfy.sd takes no config (for host/loading" in said and 'comfy.samplers has no "no such key"' in said
    assert "docs/hosts.md" in said and said.count("(for ") == 3
    assert "class Other (for patches/reference" in caplog.text
