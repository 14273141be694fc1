"""Compile programs into one archive with AOTInductor.

The exported programs come by name, with their constants as they are to be kept. Where compiling fails, an error says in
one line what is missing, and nothing is left beside the archive.

Private torch use, with the public route that was tried: ``torch._inductor.aot_compile`` and ``package_aoti`` are the
two halves of ``aoti_compile_and_package``. As a whole, that leaves a copy of all weights in the user's compiler cache,
under a name that programs of equal code share.
"""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from adaptc.adapter_files.safe_torch_save import writing
from adaptc.errors import BackendError
from adaptc.passes.graph.graph_lock import on_graphs
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


@contextmanager
def code_folder(new: Path) -> Iterator[Path]:
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


def compiled(
    models: Mapping[str, ExportedProgram], code: Path, file: Path, metadata: Mapping[str, Mapping[str, str]]
) -> None:
    """Compile ``models`` by name into the AOTInductor archive ``file``.

    ``metadata`` has entries for each model. Everything the compiler leaves behind is in the folder ``code``. Raises
    OSError where the disk is at fault, and BackendError where anything else is.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    files: dict[str, Any] = {}
    try:
        with on_graphs(), torch.no_grad(), warnings.catch_warnings():
            # torch copies its own tree specs by a class that it has deprecated.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            for number, (name, program) in enumerate(models.items(), 1):
                args, kwargs = program.example_inputs  # type: ignore[misc]  # checked by the caller
                module, folder = program.module(check_guards=False), code / name
                folder.mkdir()
                options = {"aot_inductor.output_path": str(folder), "aot_inductor.metadata": dict(metadata[name])}
                with stage(f"compiling {name!r} with AOTInductor ({number} of {len(models)})"):
                    files[name] = aot_compile(module, args, kwargs, options={**OPTIONS, **options})
            with stage("packaging the compiled code"), writing(file) as archive:
                package_aoti(archive, files)  # ``aot_inductor.package`` makes each entry a list of files
    except Exception as error:
        if (full := _disk_error(error)) is not None:
            raise full from error
        raise BackendError(_reason(error)) from error


_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS)


def _disk_error(error: BaseException) -> OSError | None:
    """Return the error of the disk, if that is why compiling failed; None otherwise.

    Compilers report it in texts of their own, so the messages are searched, too.
    """
    for e in _chain(error):
        if isinstance(e, OSError) and e.errno in _DISK:
            return e
    text = " ".join(map(str, _chain(error)))
    if "File size limit exceeded" in text:  # the signal that ended a compiler
        return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return next((OSError(n, os.strerror(n)) for n in _DISK if os.strerror(n) in text), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _reason(error: BaseException) -> str:
    if any(type(e).__name__ == "InvalidCxxCompiler" for e in _chain(error)):
        return (
            "packaging needs a C++ compiler, and none works here. Install g++ or clang++, or name one in the "
            "environment variable CXX; adaptc.save writes a file that needs none."
        )
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"AOTInductor could not compile the program: {first}. adaptc.save writes a file that is not compiled."
