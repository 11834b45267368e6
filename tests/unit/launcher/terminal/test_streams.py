"""The ends of a program: encodings, pipes that close, interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PROGRAM = """
import sys
from launcher.terminal.streams import open_streams, run_at_terminal
open_streams(stops={stops})
def main():
{body}
sys.exit(run_at_terminal(main))
"""
TELLS = "    for number in range({lines}):\n        print('line', number, 'für 中文 🙂 \\udcff')\n    return 3\n"


def words_of(body: str, *, stops: bool = False, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *options, "-c", PROGRAM.format(stops=stops, body=body)]


def environment(**variables: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**inherited, "PYTHONPATH": str(ROOT), **variables}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "ascii:strict"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding: str) -> None:
    """Search on a terminal of ASCII ended in a UnicodeEncodeError at the first document with an umlaut."""
    env = environment(PYTHONIOENCODING=encoding)
    done = subprocess.run(words_of(TELLS.format(lines=1)), env=env, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (3, b"")
    told = done.stdout.decode(encoding.split(":")[0])
    assert told.startswith("line 0 f")
    assert "\\udcff" in told
    assert ("中文" if encoding == "utf-8" else "\\u4e2d\\u6587") in told


@pytest.mark.parametrize(("stops", "code"), [(True, 141), (False, 3)])
@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_reader_that_goes(stops: bool, code: int, lines: int, options: tuple[str, ...]) -> None:
    """`status RUN | head -1` printed a BrokenPipeError, at once or at the end of the process, and ended with 120."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        words_of(TELLS.format(lines=lines), stops=stops, options=options),
        env=environment(), stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


def test_what_a_program_does_is_finished_where_nobody_reads(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    body = f"    print('begun', flush=True)\n    open({str(tmp_path / 'done')!r}, 'w').close()\n    return 0\n"
    done = subprocess.run(words_of(body), env=environment(), stdout=write, stderr=write, check=False)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()


def test_nobody_need_read_the_log() -> None:
    """A run whose log went into `2>&1 | head -1` died of its next line of log."""
    read, write = os.pipe()
    os.close(read)
    body = """
    import logging
    from engine.log import get_logger, set_up_logging
    from engine.reliability.progress import progress_bar
    set_up_logging(0, 1)
    for number in range(3):
        get_logger("x").info("line %d", number)
        print("line", file=sys.stderr)
    with progress_bar("x", 10, "step", shown=True) as bar:
        bar.update(10)
    return 7
"""
    done = subprocess.run(words_of(body), env=environment(), stdout=subprocess.PIPE, stderr=write, check=False)
    os.close(write)
    assert (done.returncode, done.stdout) == (7, b"")


def test_what_a_library_says_of_its_tries_stays_away() -> None:
    """Of a hub that is not reached a plan showed eleven lines of tries, and then its own."""
    body = """
    from engine.log import set_up_logging
    set_up_logging(0, 1)
    from huggingface_hub.utils import logging
    logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 1s")
    logging.get_logger("huggingface_hub.utils._http").error("a failure")
    return 0
"""
    done = subprocess.run(words_of(body), env=environment(), capture_output=True, text=True, check=True)
    assert "Retrying" not in done.stderr
    assert "a failure" in done.stderr


@pytest.mark.parametrize("closed", ["stdin", "stdout", "stderr"])
def test_streams_that_were_closed_before(closed: str, tmp_path: Path) -> None:
    """With `>&-` the number of standard output was given to the first file that was opened, and prints went into it."""
    number = ["stdin", "stdout", "stderr"].index(closed)
    body = f"""
    with open({str(tmp_path / "file")!r}, "w") as file:
        print("told")
        print("said", file=sys.stderr)
        import os
        os.write({number or 1}, b"by a library\\n")
    return 3 if sys.stdin.read() == "" else 4
"""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {number}{"<" if closed == "stdin" else ">"}&-', "bash", *words_of(body)],
        env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "file").read_text() == ""
    assert ("told" in done.stdout) == (closed != "stdout")
    assert ("said" in done.stderr) == (closed != "stderr")


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_an_output_that_cannot_be_written_is_said(options: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            words_of("    print('x')\n    return 0\n", options=options),
            env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: No space left on device.\n")


def test_a_locale_of_ascii(tmp_path: Path) -> None:
    """Under `LC_ALL=C PYTHONUTF8=0` words came as broken bytes, and files of libraries could not be read."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom launcher.terminal.streams import begin_in_utf8, open_streams\nbegin_in_utf8()\n"
        "open_streams()\nprint(sys.getfilesystemencoding(), sys.stdout.encoding, ascii(sys.argv[1:]), sys.argv[1])\n"
    )
    words = [sys.executable, "-W", "ignore", str(script), "ü 中", "-x", b"\xff"]
    done = subprocess.run(words, env=environment(LC_ALL="C", PYTHONUTF8="0"), capture_output=True, check=True)
    assert done.stdout == b"utf-8 ascii ['\\xfc \\u4e2d', '-x', '\\udcff'] \\xfc \\u4e2d\n"
    (told,) = {
        subprocess.run(words, env=environment(**env), capture_output=True, check=True).stdout.split()[0]
        for env in ({"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONUTF8": "1"}, {"LC_ALL": "C"})
    }
    assert told == b"utf-8"


def test_bytes_of_the_standard_input_that_are_no_text() -> None:
    body = "    print(ascii(sys.stdin.read()))\n    return 0\n"
    for encoding, told in (("utf-8", "'f\\xfcr \\udcff'"), ("ascii", "'f\\udcc3\\udcbcr \\udcff'")):
        env = environment(PYTHONIOENCODING=encoding)
        done = subprocess.run(words_of(body), env=env, input=b"f\xc3\xbcr \xff", capture_output=True, check=False)
        assert (done.stdout.decode().strip(), done.stderr) == (told, b"")


@pytest.mark.parametrize(
    "script",
    [
        words_of("    print('ready', flush=True)\n    import time; time.sleep(60)\n    return 0\n")[-1],
        # while libraries are being imported, before there is a main function
        "from launcher.terminal.streams import open_streams\nopen_streams()\nimport time\n"
        "print('ready', flush=True)\ntime.sleep(60)\n",
    ],
)
def test_an_interrupt_is_one_line(script: str) -> None:
    """Ctrl-C in the seconds in which torch is imported printed pages of frames."""
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_an_error_still_has_its_traceback() -> None:
    done = subprocess.run(
        words_of("    raise ZeroDivisionError('x')\n"), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: x\n")
    assert "Traceback" in done.stderr
