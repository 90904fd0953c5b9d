"""Compiles one CUDA C++ file to PTX with NVRTC, which needs no GPU, no driver
and no toolkit. Called by `cargo xtask ptx`.

nvrtc.py LIBNVRTC SOURCE PTX OPTION...

Headers are the .cuh files beside SOURCE. NVRTC's warnings and errors go to
standard error; the exit status is 1 where it made nothing.
"""

import ctypes
import pathlib
import sys


class Nvrtc:
    def __init__(self, path):
        self.library = ctypes.CDLL(path)
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            what = self.library.nvrtcGetErrorString(status).decode()
            raise RuntimeError(f"{name}: {what}")

    def text(self, program, name):
        """What `nvrtcGet<name>Size` and `nvrtcGet<name>` say, without its zero."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{name}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{name}", program, buffer)
        return buffer.value.decode()


def strings(items):
    return (ctypes.c_char_p * len(items))(*(item.encode() for item in items))


def compile_file(library, source, options):
    nvrtc = Nvrtc(library)
    source = pathlib.Path(source)
    headers = sorted(source.parent.glob("*.cuh"))
    program = ctypes.c_void_p()
    nvrtc.call(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source.read_bytes(),
        source.name.encode(),
        len(headers),
        strings([header.read_text() for header in headers]),
        strings([header.name for header in headers]),
    )
    try:
        nvrtc.call("nvrtcCompileProgram", program, len(options), strings(options))
        return nvrtc.text(program, "PTX")
    finally:
        log = nvrtc.text(program, "ProgramLog").strip()
        if log:
            print(log, file=sys.stderr)


def main():
    library, source, ptx, *options = sys.argv[1:]
    try:
        text = compile_file(library, source, options)
    except (OSError, RuntimeError) as error:
        sys.exit(f"{source}: {error}")
    pathlib.Path(ptx).write_text(text)


if __name__ == "__main__":
    main()
