"""Compile programs into one archive with AOTInductor, and write the package that has it.

The exported programs come by name, with their constants as they are to be kept. The manifest and other files lie beside
the code. Where compiling fails, an error says in one line what is missing, and nothing is left beside the archive.

Private torch use, with the public route that was tried: ``torch._inductor.aot_compile`` and ``package_aoti`` are the
two halves of ``aoti_compile_and_package``. As a whole, that leaves a copy of all weights in the user's compiler cache,
under a name that programs of equal code share.
"""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from adaptc.adapter_files.atomic_write import atomic_replace, explain_write_errors
from adaptc.adapter_files.safe_torch_save import open_for_torch_save
from adaptc.archives.added_files import AddedFiles
from adaptc.errors import BackendError, CheckpointError, ConfigError, short_repr
from adaptc.packages import manifest as _package_file
from adaptc.packages.cpp_slot_table import METADATA_KEY, slot_table
from adaptc.packages.manifest import Contents, Manifest
from adaptc.packages.shorter_compiling import equal_ops_once, older_objects_spared, one_check_of_instructions
from adaptc.passes.graph.graph_lock import hold_graph_lock
from adaptc.progress import stage

OPTIONS: Mapping[str, Any] = {
    "aot_inductor.package": True,
    # Without these two, small slots become literals in the code, and slots that hold a single value are folded into it.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # This is for the code that calls the kernels; kernels themselves are compiled with all optimisation. A model of 30
    # layers is packaged in 51 s instead of 67 s, and its calls are no slower (31.0 ms a token, 31.4 ms with O1).
    "aot_inductor.compile_wrapper_opt_level": "O0",
    # The code uses as many threads as there are where it runs, not where it was compiled.
    "cpp.dynamic_threads": True,
}

MATMUL_CHOICES = ("measured", "plain")


@contextmanager
def code_folder(new: Path) -> Generator[Path]:
    """Run the block with a temporary folder for the compiler.

    It lies beside the file ``new``, or in the system's folder where the compiler could not read such a path. It is
    removed at the end of the block.
    """
    try:
        str(new).encode()
        near = new.parent
    except UnicodeEncodeError:
        near = None
    with tempfile.TemporaryDirectory(prefix="code-", dir=near) as folder:
        yield Path(folder)


def compile_archive(
    models: Mapping[str, ExportedProgram],
    work_folder: Path,
    archive_path: Path,
    metadata: Mapping[str, Mapping[str, str]],
) -> None:
    """Compile ``models`` by name into the AOTInductor archive ``archive_path``.

    ``metadata`` has entries for each model. Everything the compiler leaves behind is in the folder ``work_folder``.
    Raises OSError where the disk is at fault, and BackendError where anything else is.
    """
    from torch._inductor import aot_compile
    from torch._inductor.config import aot_inductor
    from torch._inductor.package.package import package_aoti

    files: dict[str, Any] = {}
    try:
        with (
            hold_graph_lock(),
            equal_ops_once(),
            one_check_of_instructions(),
            older_objects_spared(),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # torch copies its own tree specs by a class that it has deprecated.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            for number, (name, program) in enumerate(models.items(), 1):
                examples: Any = program.example_inputs  # never None: checked by the caller
                args, kwargs = examples
                module, folder = program.module(check_guards=False), work_folder / name
                folder.mkdir()
                options: dict[str, Any] = {"aot_inductor.output_path": str(folder)}
                options["aot_inductor.metadata"] = dict(metadata[name])
                if hasattr(aot_inductor, "enable_line_tables"):
                    # They are for tools that look for the time a program takes, and cost a tenth of the compiler's.
                    options["aot_inductor.enable_line_tables"] = False
                with stage(f"compiling {name!r} with AOTInductor ({number} of {len(models)})"):
                    files[name] = aot_compile(module, args, kwargs, options={**OPTIONS, **options})
            with stage("packaging the compiled code"), open_for_torch_save(archive_path) as archive:
                package_aoti(archive, files)  # ``aot_inductor.package`` makes each entry a list of files
    except Exception as error:
        if (disk_error := _disk_error(error)) is not None:
            raise disk_error from error
        raise BackendError(_failure_message(error)) from error


def check_package_options(path: Path, max_rank: int | None, products: str) -> None:
    """Raise CheckpointError for a path where no package can be written, ConfigError for options of other values."""
    if path.suffix != ".pt2" or not path.parent.is_dir():
        raise CheckpointError(f"cannot package to {path}: the name must end in .pt2 and its directory must exist")
    rank: Any = max_rank  # callers may give anything, here and below
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"max_rank must be a positive integer, got {max_rank!r}")
    chosen: Any = products
    if not isinstance(chosen, str) or chosen not in MATMUL_CHOICES:
        raise ConfigError(f"products={short_repr(products)} is not one of {', '.join(MATMUL_CHOICES)}")


def write_package(
    path: Path,
    models: Mapping[str, ExportedProgram],
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    package_files: Mapping[str, bytes],
    added: AddedFiles,
) -> Path:
    """Compile programs and write a package of them to ``path``, which is as it was where that fails.

    The manifest, ``tensors``, ``package_files`` and the ``added`` files lie beside the code. Raises CheckpointError
    where the file cannot be written.
    """
    tables: dict[str, dict[str, str]] = {name: {} for name in models}
    if manifest.bank is None:  # the table describes the slots of a single adapter
        tables = {n: {METADATA_KEY: slot_table(_manifest_of_part(m, n, manifest))} for n, m in models.items()}
    # Both lie beside the target, on a disk that must have room for the package anyway.
    with explain_write_errors(path), atomic_replace(path, "new.pt2") as new_path, code_folder(new_path) as work_folder:
        compile_archive(models, work_folder, new_path, tables)
        with stage(f"writing the package {path.name}"):
            _package_file.write(new_path, Contents(manifest, tensors, package_files, added))
    return path


def _manifest_of_part(model: ExportedProgram, name: str, manifest: Manifest) -> Manifest:
    """Return the manifest as it is for one part: with the part's inputs, and the sites whose slots it has."""
    if not manifest.parts:
        return manifest
    sites = [s for s in manifest.sites if all(fqn in model.state_dict for fqn in s.attachment.tensor_names)]
    return replace(manifest, inputs=manifest.parts[name].inputs, sites=sites)


_DISK_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


def _disk_error(error: BaseException) -> OSError | None:
    """Return the error of the disk, if that is why compiling failed; None otherwise.

    Compilers report it in texts of their own, so the messages are searched, too.
    """
    for e in _error_chain(error):
        if isinstance(e, OSError) and e.errno in _DISK_ERRNOS:
            return e
    text = " ".join(map(str, _error_chain(error)))
    if "File size limit exceeded" in text:  # the signal that ended a compiler
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return next((OSError(n, os.strerror(n)) for n in _DISK_ERRNOS if os.strerror(n) in text), None)


def _error_chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _failure_message(error: BaseException) -> str:
    if any(type(e).__name__ == "InvalidCxxCompiler" for e in _error_chain(error)):
        return (
            "packaging needs a C++ compiler, and none works here. Install g++ or clang++, or name one in the "
            "environment variable CXX; adaptc.save writes a file that needs none."
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"AOTInductor could not compile the program: {first}. adaptc.save writes a file that is not compiled."
