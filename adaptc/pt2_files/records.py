"""List the records that a program's ``.pt2`` file has, and recognise archives of other kinds."""

from __future__ import annotations

import re

from adaptc.pt2_files.archive import Archive
from adaptc.pt2_files.refusal import UnsafeFile, shown

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS_FOLDER = "data/weights"
CONSTANTS_FOLDER = "data/constants"
WEIGHTS = f"{WEIGHTS_FOLDER}/model_weights_config.json"
CONSTANTS = f"{CONSTANTS_FOLDER}/model_constants_config.json"

_NEEDED = ("archive_format", "archive_version", MODEL, SAMPLES, WEIGHTS, CONSTANTS)
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.]+|\.format_version|\.storage_alignment"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/((tensor|custom_obj|opaque_obj)_\d+|model_constants_config\.json)"
    r"|extra/.+|data/extra/.+",
    re.ASCII,
)


def check_program(archive: Archive) -> None:
    """Refuse archives of other kinds, and records that a program does not have.

    Files beside the program (``extra_files``) and pickled objects are allowed here, and are never read. A use of such
    an object is refused where it occurs.
    """
    found = archive.records
    if any(n.startswith("data/aotinductor/") for n in found):
        made = (
            "that adaptc.package wrote" if "data/extra/adaptc.json" in found else "of AOTInductor, made without adaptc"
        )
        raise UnsafeFile(
            f"it is a package {made}, and holds compiled code, which torch.export.load would run at once. If you trust "
            "its author open it with adaptc.load_package, else ask for a file of adaptc.save"
        )
    if "serialized_exported_program.json" in found:
        raise UnsafeFile("it was written by torch 2.7 or older; load it there, and save it with a newer torch")
    for name in _NEEDED:
        if name not in found:
            raise UnsafeFile(f"there is no record {name!r}")
    for name in found:
        if not _KNOWN.fullmatch(name):
            others = name.startswith(("models/", "data/"))
            hint = "; adaptc reads files of one program, of the name 'model'" if others else ""
            raise UnsafeFile(f"record {shown(name)} is none that a program has{hint}")
    for name, wanted in (("archive_format", b"pt2"), ("archive_version", b"0"), ("byteorder", b"little")):
        if name in found and (text := archive.read(name, 64)) != wanted:
            raise UnsafeFile(
                f"expected {name} {wanted.decode()}, found {shown(text.decode(errors='backslashreplace'))}"
            )
