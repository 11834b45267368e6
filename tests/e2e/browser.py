"""Chromium, where it is installed: how a page of HTML is laid out, and whether its script may run."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_QUIETLY = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *(
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--window-size=1400,1000",
        "--dump-dom",
    ),
)
_LOOK = """
const frame = document.getElementById("frame");
frame.onload = function () {
  const inside = frame.contentDocument, root = inside.documentElement;
  const shown = [...inside.querySelectorAll("svg")].filter(one => one.getClientRects().length);
  const outside = [...inside.querySelectorAll("body *")].filter(
    one => one.getBoundingClientRect().right > frame.clientWidth + 1 && !one.closest(".scroll, pre, svg"));
  const folded = inside.querySelectorAll("details:not([open])").length;
  frame.contentWindow.dispatchEvent(new Event("beforeprint"));
  document.getElementById("seen").textContent = JSON.stringify({
    width: root.scrollWidth, drawings: shown.length, folded: folded,
    flat: shown.filter(one => one.getBoundingClientRect().height < 8).length,
    outside: outside.map(one => one.tagName + " " + one.className),
    left_folded: inside.querySelectorAll("details:not([open])").length,
    paper: getComputedStyle(inside.body).backgroundColor,
  });
};
frame.srcdoc = document.getElementById("page").content.textContent;
"""


def seen(page: Path, folder: Path, *, width: int, is_dark: bool) -> dict[str, Any]:
    """Look at a page in a window of some width.

    Args:
        page: The file.
        folder: Takes the browser's own files.
        width: Of the window, in CSS pixels.
        is_dark: Whether the reader prefers dark pages.

    Returns:
        Width of what is laid out, elements that stick out of the window, drawings that are seen and flat ones, how many
        parts are folded before and after printing begins, colour of the paper; and of a screenshot, what is of another
        colour than the paper (`ink`), 0..1, and how bright the paper is.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed, in which the page would be laid out: apt-get install chromium")
    outer = folder / "outer.html"
    outer.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><template id="page">{html.escape(page.read_text())}</template>'
        f'<iframe id="frame" width="{width}" height="900" style="border: 0"></iframe><p id="seen"></p>'
        f"<script>{_LOOK}</script>"
    )
    preferred = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if is_dark else []
    shot = folder / "screenshot.png"
    ended = subprocess.run(
        [
            chromium,
            *_QUIETLY,
            *preferred,
            f"--screenshot={shot}",
            f"--user-data-dir={folder / 'browser'}",
            outer.as_uri(),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    require_silent_console(ended.stderr)
    told = re.search(r'<p id="seen">(.+?)</p>', ended.stdout)
    assert told is not None, ended.stdout[-2000:] + ended.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told[1]))
    return found | drawn(shot, width)


def drawn(shot: Path, width: int) -> dict[str, float]:
    """Return how much of a screenshot is written or drawn, and how bright its paper is, both 0..1.

    Args:
        shot: PNG, which begins with the page.
        width: Of the page in it, in pixels.
    """
    from matplotlib.image import imread

    page_HWC = np.asarray(imread(shot))[8:900, 8 : width + 8, :3]
    colours, counts = np.unique(np.round(page_HWC * 255).astype(np.uint8).reshape(-1, 3), axis=0, return_counts=True)
    return {
        "ink": float(1 - counts.max() / counts.sum()),
        "paper_brightness": float(colours[counts.argmax()].mean() / 255),
    }


def require_silent_console(logged: str) -> None:
    """Refuse a page that has broken its own policy, asked for something outside, or failed in its script.

    Args:
        logged: What Chromium wrote with --enable-logging=stderr.
    """
    told = [line for line in logged.splitlines() if ":CONSOLE" in line]
    assert not told, told
