"""The native core: one shared library of plain C functions, called through ctypes. Everything else: pyproject.toml.

It is not an extension module: it links neither Python nor torch, so one wheel of a platform serves every Python.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("kernels/native")
IS_ARM_LINUX = sys.platform == "linux" and platform.machine() == "aarch64"


class BuildLibrary(build_ext):
    """A shared library under its plain name, without a Python version in it."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    @staticmethod
    def flags_of(source: str) -> list[str]:
        """What one file needs beside the flags of all."""
        if source.endswith("fit_groups.cpp"):
            return ["-ffp-contract=off"]  # the same bytes on every machine
        return ["-march=armv8.2-a+dotprod"] if IS_ARM_LINUX and source.endswith("isa_neon.cpp") else []

    def build_extension(self, ext: Extension) -> None:
        """Flags of single files; setuptools knows only those of whole extensions."""
        compile_file = self.compiler._compile

        def compile_for_target(obj: str, src: str, suffix: str, cc_args: list, postargs: list, pp_opts: list) -> None:
            compile_file(obj, src, suffix, cc_args, [*postargs, *self.flags_of(src)], pp_opts)

        self.compiler._compile = compile_for_target
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """A wheel for any Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "moepack.kernels.native_core",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in [*NATIVE.glob("*.h"), *NATIVE.glob("*.inl")]),
            # contract: a * b + c is one fused instruction where there is one. Not -ffast-math: sums keep their order.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-pthread",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-Wno-unknown-pragmas",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
